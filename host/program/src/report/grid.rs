//! Tables for the terminal.

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, presets};

/// Columns of a table if the terminal's width is not known.
pub const WIDTH: u16 = 100;

/// A table with names at the left, figures at the right and a rule under the header. If it would be wider than `width`,
/// columns move closer, and then names break after an underscore. Every row has a cell for each of `header`.
pub(crate) fn grid(header: &[&str], mut rows: Vec<Vec<String>>, width: u16) -> String {
    let header: Vec<String> = header.iter().map(|text| text.replace(' ', "\n")).collect();
    let columns = || rows.iter().chain([&header]);
    let widest = |column: usize| columns().map(|row| cell_width(&row[column])).max().unwrap_or(0);
    let figures: usize = (1..header.len()).map(widest).sum();
    let names = widest(0);
    let (width, gaps) = (usize::from(width), header.len() - 1);
    let gap: u16 = if names + figures + 2 * gaps <= width { 2 } else { 1 };
    let room = width.saturating_sub(figures + gaps).max(LEAST_NAME);
    for row in &mut rows {
        row[0] = broken(&row[0], room);
    }

    let mut table = Table::new();
    table.load_style(presets::NOTHING.header_separator(LineStyle::none().fill('-').junction('-')));
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table.add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        if index == 0 {
            column.set_padding((0, 0));
        } else {
            // The style has one space between columns already.
            column.set_padding((gap - 1, 0)).set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// The least length of a line of a broken name.
const LEAST_NAME: usize = 24;

fn cell_width(text: &str) -> usize {
    text.lines().map(|line| line.chars().count()).max().unwrap_or(0)
}

/// Breaks `name` after underscores into lines of at most `room` characters.
fn broken(name: &str, room: usize) -> String {
    let mut lines = vec![String::new()];
    for word in name.split_inclusive('_') {
        let line = lines.len() - 1;
        if !lines[line].is_empty() && cell_width(&lines[line]) + cell_width(word) > room {
            lines.push(format!("  {word}"));
        } else {
            lines[line].push_str(word);
        }
    }
    lines.join("\n")
}
