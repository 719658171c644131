//! Tables for the terminal, and the fit of text into its columns.

use comfy_table::{CellAlignment, ContentArrangement, LineStyle, Table, presets};

/// Columns of a table if the terminal's width is not known.
pub const WIDTH: u16 = 100;

/// The least length of a line of a broken name.
const LEAST_NAME: usize = 24;

/// The indentation of the rest of a broken line.
const INDENT: &str = "  ";
/// A line break and the indentation.
const NEXT_LINE: &str = "\n  ";
/// A space at which no line breaks.
const NO_BREAK: &str = "\u{a0}";

/// A [`table`] whose first column has names.
pub(crate) fn grid(header: &[&str], rows: Vec<Vec<String>>, width: u16) -> String {
    table(1, header, rows, width)
}

/// A table with `names` columns of names at the left, figures at the right and a rule under the header. If it would be
/// wider than `width`, columns move closer, and then the names of the first column break after an underscore. Where that
/// is not enough, each row becomes a [record]. Every row has a cell for each of `header`.
pub(crate) fn table(names: usize, header: &[&str], mut rows: Vec<Vec<String>>, width: u16) -> String {
    let labels: Vec<String> = header.iter().map(|text| text.replace(' ', "\n")).collect();
    let columns = || rows.iter().chain([&labels]);
    let widest = |column: usize| columns().map(|row| cell_width(&row[column])).max().unwrap_or(0);
    let others: usize = (1..header.len()).map(widest).sum();
    let first = widest(0);
    let (width, gaps) = (usize::from(width), header.len() - 1);
    let gap: u16 = if first + others + 2 * gaps <= width { 2 } else { 1 };
    let room = width.saturating_sub(others + gaps);
    if room < first.min(LEAST_NAME) {
        return rows.iter().map(|row| record(header, row, width)).collect::<Vec<_>>().join("\n");
    }
    for row in &mut rows {
        row[0] = broken(&row[0], room).join(NEXT_LINE);
    }

    let mut table = Table::new();
    table.load_style(presets::NOTHING.header_separator(LineStyle::none().fill('-').junction('-')));
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(labels);
    table.add_rows(rows);
    for (index, column) in table.column_iter_mut().enumerate() {
        // The style has one space between columns already.
        column.set_padding((if index == 0 { 0 } else { gap - 1 }, 0));
        if index >= names {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// A row for a terminal that is too narrow for a table: the name on a line of its own, then the other cells, each after
/// its header.
fn record(header: &[&str], row: &[String], width: usize) -> String {
    // A header and its cell stay together.
    let pair = |(label, cell): (&&str, &String)| format!("{label} {cell}").replace(' ', NO_BREAK);
    let cells: Vec<String> = header.iter().zip(row).skip(1).map(pair).collect();
    let cells = format!("{INDENT}{}", cells.join(", "));
    let lines = [broken(&row[0], width), broken(&cells, width)].map(|lines| lines.join(NEXT_LINE));
    lines.join("\n").replace(NO_BREAK, " ")
}

/// `text` with line breaks between words, so that no line is longer than `width`. The rest of a line is indented.
pub(crate) fn wrapped(text: &str, width: usize) -> String {
    let lines: Vec<String> = text.split('\n').map(|line| broken(line, width).join(NEXT_LINE)).collect();
    lines.join("\n")
}

fn cell_width(text: &str) -> usize {
    text.lines().map(|line| line.chars().count()).max().unwrap_or(0)
}

/// Breaks a line that is longer than `room` between words, and a word that is too long by itself after underscores. The
/// lines after the first leave room for the indentation.
fn broken(text: &str, room: usize) -> Vec<String> {
    if cell_width(text) <= room {
        return vec![text.to_owned()];
    }
    let parts = text.split_inclusive(' ').flat_map(|word| {
        let is_long = INDENT.len() + cell_width(word.trim_end()) > room;
        word.split_inclusive(if is_long { '_' } else { ' ' })
    });
    let mut lines = vec![String::new()];
    for part in parts {
        let indent = if lines.len() == 1 { 0 } else { INDENT.len() };
        match lines.last_mut() {
            Some(line)
                if line.is_empty() || indent + cell_width(line) + cell_width(part.trim_end()) <= room =>
            {
                line.push_str(part);
            }
            _ => lines.push(part.to_owned()),
        }
    }
    lines.iter().map(|line| line.trim_end().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: [&str; 7] = ["Operation", "median µs", "min µs", "p99 µs", "busbw GB/s", "ulp", "speedup"];

    fn rows() -> Vec<Vec<String>> {
        let row = |cells: [&str; 7]| cells.map(str::to_owned).to_vec();
        vec![
            row([
                "standard_custom_allreduce_native_rms_norm_custom_quant_fp8",
                "12345.68",
                "12345.68",
                "12345.68",
                "0.17",
                "0.50",
                "baseline",
            ]),
            row([
                "fused_allreduce_rmsnorm_fp8_quant_oneshot",
                "9.50",
                "9.25",
                "FAILED",
                "-",
                "0.56",
                "2.00x",
            ]),
        ]
    }

    #[test]
    fn no_line_is_longer_than_the_terminal_is_wide_and_nothing_is_lost() {
        for width in 40..=140 {
            let text = grid(&HEADER, rows(), width);
            assert!(text.lines().all(|line| line.chars().count() <= width.into()), "{width}:\n{text}");
            let cells = rows().concat();
            for cell in cells.iter().filter(|cell| !cell.contains('_')) {
                assert!(text.contains(cell.as_str()), "{width}: no {cell} in\n{text}");
            }
        }
    }

    #[test]
    fn a_narrow_terminal_gets_a_record_for_each_row() {
        let expected = "\
standard_custom_allreduce_native_rms_
  norm_custom_quant_fp8
  median µs 12345.68, min µs 12345.68,
  p99 µs 12345.68, busbw GB/s 0.17,
  ulp 0.50, speedup baseline
fused_allreduce_rmsnorm_fp8_quant_
  oneshot
  median µs 9.50, min µs 9.25,
  p99 µs FAILED, busbw GB/s -, ulp 0.56,
  speedup 2.00x";
        assert_eq!(grid(&HEADER, rows(), 40), expected);
    }

    #[test]
    fn long_lines_break_between_words() {
        let note = "note: standard_custom_allreduce uses the two-shot all-reduce (one-shot 13.38 µs, two-shot 13.25 µs)\n";
        let expected = "\
note: standard_custom_allreduce uses the
  two-shot all-reduce (one-shot 13.38
  µs, two-shot 13.25 µs)
";
        assert_eq!(wrapped(note, 40), expected);
        assert_eq!(wrapped(note, 120), note);
        assert_eq!(wrapped("", 40), "");
        assert_eq!(wrapped("\nshort\n\nshort", 40), "\nshort\n\nshort");
        // A word that is too long by itself.
        let name = "FAILED flashinfer_trtllm_fused_allreduce_rmsnorm_fp8_quant_oneshot: no\n";
        let expected = "\
FAILED flashinfer_trtllm_fused_
  allreduce_rmsnorm_fp8_quant_oneshot:
  no
";
        assert_eq!(wrapped(name, 40), expected);
    }
}
