//! The report as a plot: time over tokens, log-log, one panel for each element type and quantization mode.
//!
//! A line is a variant, or the fastest of several, with its name at the end. Fused variants are solid and strong, separate
//! ones dashed, peers thin, so that a glance shows the faster kind. No two lines of a panel have both colour and mark in
//! common, and a name keeps them in all panels. What failed everywhere has no line, and its name says FAILED.
//!
//! The picture has the width of a README, and brings its own background: light, or dark where the reader's settings are.

mod axes;

use std::{collections::BTreeMap, fmt::Write as _, io, ops::Range};

use fused_collective_core::dtype::DType;
use plotters::{
    coord::{Shift, combinators::BindKeyPoints},
    element::DashedPathElement,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use axes::{NAME_HEIGHT, spread, time_ticks, visible_ticks};

use super::data::{Configuration, Report, Row, short_name};
use crate::{bounded::one_line, measurement::Kind, quant_mode::QuantMode, report::grid::wrapped};

/// A drawing error. Drawing into memory hardly has any.
pub type PlotError = DrawingAreaErrorKind<io::Error>;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The lines of a plot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lines {
    /// Those that decide: the fastest separate variant at each token count, every fused one of this project, and each
    /// peer's fastest.
    Deciding,
    /// A line for each variant.
    All,
}

/// Width of the plot, unless names need more.
const WIDTH: i32 = 860;
/// Least width of a panel, without the names to the right.
const LEAST_PANEL: i32 = 480;
/// Least height of a panel.
const LEAST_HEIGHT: i32 = 300;
/// Margin around the plot.
const MARGIN: i32 = 20;
/// Width of the time labels, left of a panel's axis.
const LEFT: i32 = 98;
/// Width of a character of a name in bold, and of what is between a line's end and its name.
const CHARACTER: f64 = 8.0;
const JOINT: i32 = 46;
/// Width of a character of the heading.
const SMALL_CHARACTER: i32 = 7;
/// Heights of the title, and of a line below it.
const TITLE: i32 = 40;
const HEADING_LINE: i32 = 18;
/// Space above and below a panel's axes.
const TOP: i32 = 40;
const BOTTOM: i32 = 50;
/// Half the width of a mark.
const MARK: i32 = 4;
/// Marks that differ in shape.
const MARKS: usize = 6;

const FONT: &str = "sans-serif";
const PAPER: RGBColor = RGBColor(0xff, 0xff, 0xff);
const INK: RGBColor = RGBColor(0x22, 0x26, 0x2b);
const SOFT_INK: RGBColor = RGBColor(0x5c, 0x63, 0x6b);
const GRID: RGBColor = RGBColor(0xe3, 0xe6, 0xea);
const FRAME: RGBColor = RGBColor(0xb4, 0xba, 0xc2);
const FAILED: RGBColor = RGBColor(0xb4, 0x23, 0x18);
/// The colours of lines, in turn. In CIELAB every two are 29 apart or more, as people see them whose vision lacks one of the
/// three cones (Machado, Oliveira and Fernandes 2009) and as others do. So are those on a dark background.
const COLORS: [RGBColor; 6] = [
    RGBColor(0x3f, 0x46, 0x50),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x90, 0x18, 0xf0),
    RGBColor(0x78, 0x30, 0x18),
    RGBColor(0xa8, 0x90, 0x78),
];
/// The colours on a dark background, in the place of those on a light one.
const DARK: [(RGBColor, RGBColor); 12] = [
    (PAPER, RGBColor(0x0d, 0x11, 0x17)),
    (INK, RGBColor(0xe6, 0xea, 0xef)),
    (SOFT_INK, RGBColor(0xa3, 0xac, 0xb6)),
    (GRID, RGBColor(0x26, 0x2c, 0x34)),
    (FRAME, RGBColor(0x58, 0x60, 0x6b)),
    (FAILED, RGBColor(0xff, 0x8b, 0x80)),
    (COLORS[0], RGBColor(0xc9, 0xd1, 0xd9)),
    (COLORS[1], RGBColor(0x4e, 0xa5, 0xe8)),
    (COLORS[2], RGBColor(0xff, 0x8b, 0x3d)),
    (COLORS[3], RGBColor(0x78, 0x60, 0xf0)),
    (COLORS[4], RGBColor(0xf0, 0x00, 0x78)),
    (COLORS[5], RGBColor(0xf0, 0xc0, 0x90)),
];

/// A line's look besides its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Separate,
    Fused,
    Peer,
}

/// One line of a panel.
struct Line {
    name: String,
    look: Look,
    /// The place of its colour and mark, the same in all panels.
    style: usize,
    /// Median microseconds by tokens; empty if it failed everywhere.
    points: BTreeMap<u64, f64>,
}

impl Line {
    /// The name, with the last time of the line.
    fn label(&self) -> String {
        match self.points.values().next_back() {
            Some(time) => format!("{}: {time:.2}", self.name),
            None => format!("{}: FAILED", self.name),
        }
    }

    fn color(&self) -> RGBColor {
        COLORS[self.style % COLORS.len()]
    }

    /// Draws the line's mark.
    fn mark(&self, root: &Area<'_>, (x, y): (i32, i32)) -> Result<(), PlotError> {
        let color = self.color();
        let fill = if self.look == Look::Fused { color } else { PAPER };
        let outline = match self.style / COLORS.len() % MARKS {
            0 => {
                root.draw(&Circle::new((x, y), MARK, fill.filled()))?;
                return root.draw(&Circle::new((x, y), MARK, color.stroke_width(2)));
            }
            1 => vec![(x, y - MARK), (x + MARK, y + MARK), (x - MARK, y + MARK)],
            2 => vec![(x - MARK, y - MARK), (x + MARK, y - MARK), (x + MARK, y + MARK), (x - MARK, y + MARK)],
            3 => vec![(x, y - MARK), (x + MARK, y), (x, y + MARK), (x - MARK, y)],
            4 => vec![(x - MARK, y - MARK), (x + MARK, y - MARK), (x, y + MARK)],
            _ => vec![(x - MARK, y - MARK), (x + MARK, y + MARK), (x + MARK, y - MARK), (x - MARK, y + MARK)],
        };
        root.draw(&Polygon::new(outline.clone(), fill.filled()))?;
        let closed: Vec<_> = outline.iter().chain(&outline[..1]).copied().collect();
        root.draw(&PathElement::new(closed, color.stroke_width(2)))
    }

    /// Draws the line through the pixels `points`.
    fn draw(&self, root: &Area<'_>, points: &[(i32, i32)]) -> Result<(), PlotError> {
        let color = self.color();
        match self.look {
            Look::Separate => {
                root.draw(&DashedPathElement::new(points.to_vec(), 7, 5, color.stroke_width(2)))?;
            }
            Look::Fused => root.draw(&PathElement::new(points.to_vec(), color.stroke_width(3)))?,
            Look::Peer => root.draw(&PathElement::new(points.to_vec(), color.stroke_width(2)))?,
        }
        points.iter().try_for_each(|&point| self.mark(root, point))
    }
}

struct Panel {
    dtype: DType,
    quant_mode: QuantMode,
    /// Token counts, ascending.
    tokens: Vec<f64>,
    lines: Vec<Line>,
}

/// The plot as SVG.
pub fn to_svg(report: &Report, lines: Lines) -> Result<String, PlotError> {
    let panels = panels(report, lines);
    let longest = panels.iter().flat_map(|panel| &panel.lines).map(|line| line.label().chars().count()).max();
    let right = (longest.unwrap_or(0) as f64 * CHARACTER) as i32 + JOINT + MARGIN;
    let width = WIDTH.max(LEAST_PANEL + right);
    let heading_lines = heading_lines(report, width);
    let heading_height = TITLE + HEADING_LINE * heading_lines.len() as i32;
    let heights: Vec<i32> = panels.iter().map(Panel::height).collect();
    let size = (width as u32, (heading_height + heights.iter().sum::<i32>() + MARGIN) as u32);

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&PAPER)?;
        heading(&root, &heading_lines)?;
        let mut top = heading_height;
        for (panel, height) in panels.iter().zip(heights) {
            let area = root.clone().shrink((0, top), (width, height));
            panel.draw(&root, &area, right)?;
            top += height;
        }
        root.present()?;
    }
    Ok(with_dark_colors(&svg))
}

/// Adds the colours on a dark background to an SVG: rules of a style sheet come before attributes.
fn with_dark_colors(svg: &str) -> String {
    let hex = |color: RGBColor| format!("#{:02X}{:02X}{:02X}", color.0, color.1, color.2);
    let mut style = String::from("<style>\n@media (prefers-color-scheme: dark) {\n");
    for (light, dark) in DARK.map(|(light, dark)| (hex(light), hex(dark))) {
        for attribute in ["fill", "stroke"] {
            let _ = writeln!(style, "[{attribute}=\"{light}\"] {{ {attribute}: {dark} }}");
        }
    }
    style.push_str("}\n</style>\n");
    // After the tag that opens the picture.
    let start = svg.find("<svg").and_then(|tag| Some(tag + svg[tag..].find('>')? + 1)).unwrap_or(0);
    format!("{}\n{style}{}", &svg[..start], &svg[start..])
}

/// The lines that a row belongs to: their names, the names that share a style, and looks.
fn lines_of(row: &Row, lines: Lines) -> Vec<(String, String, Look)> {
    let look = match row.kind {
        Kind::Standard => Look::Separate,
        Kind::Fused if row.peer().is_none() => Look::Fused,
        Kind::Fused => Look::Peer,
    };
    let short = short_name(&row.variant);
    if lines == Lines::All {
        return vec![(row.variant.clone(), short, look)];
    }
    let one = |name: String, look| (name.clone(), name, look);
    let separate =
        (row.kind == Kind::Standard && row.is_exact()).then(|| one("fastest separate".to_owned(), look));
    let fused = row.is_ours_fused().then(|| one(short, look));
    let of_peer = |peer| if row.is_exact() { format!("{peer}, fastest") } else { short_name(&row.variant) };
    let peer = row.peer().map(|peer| one(of_peer(peer), Look::Peer));
    separate.into_iter().chain(fused).chain(peer).collect()
}

fn panels(report: &Report, lines: Lines) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    let mut styles: Vec<String> = Vec::new();
    for configuration in &report.configurations {
        let Configuration { dtype, quant_mode, num_tokens, .. } = *configuration;
        let known = panels.iter().position(|panel| (panel.dtype, panel.quant_mode) == (dtype, quant_mode));
        let index = known.unwrap_or_else(|| {
            panels.push(Panel { dtype, quant_mode, tokens: Vec::new(), lines: Vec::new() });
            panels.len() - 1
        });
        let panel = &mut panels[index];
        panel.tokens.push(num_tokens as f64);
        for row in &configuration.rows {
            for (name, shared, look) in lines_of(row, lines) {
                let points = panel.points(name, shared, look, &mut styles);
                if let Some(figures) = row.figures() {
                    let point = points.entry(num_tokens).or_insert(f64::INFINITY);
                    *point = point.min(figures.median_us);
                }
            }
        }
    }
    for panel in &mut panels {
        panel.tokens.sort_by(f64::total_cmp);
        panel.tokens.dedup();
    }
    panels
}

fn text(size: u32, color: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    (FONT, size).into_font().color(&color).pos(Pos::new(h, v))
}

/// The lines below the title.
fn heading_lines(report: &Report, width: i32) -> Vec<String> {
    let Report { backend, world_size, settings, .. } = report;
    let residual = if settings.use_residual { "with residual" } else { "no residual" };
    let facts = format!(
        "{backend} backend, {world_size} ranks, hidden size {}, {residual}; median of {} trials, slowest rank",
        settings.hidden_dim, settings.trials
    );
    let characters = (width - 2 * MARGIN) / SMALL_CHARACTER;
    let text = format!("{facts}\n{}", one_line(&report.machine.summary()));
    wrapped(&text, characters as usize).lines().map(|line| line.trim().to_owned()).collect()
}

fn heading(root: &Area<'_>, lines: &[String]) -> Result<(), PlotError> {
    let title = "Fused all-reduce + RMSNorm + quantization against separate operations";
    root.draw_text(title, &text(23, INK, HPos::Left, VPos::Top), (MARGIN, 12))?;
    for (line, index) in lines.iter().zip(0..) {
        let at = (MARGIN, TITLE + HEADING_LINE * index);
        root.draw_text(line, &text(16, SOFT_INK, HPos::Left, VPos::Top), at)?;
    }
    Ok(())
}

impl Panel {
    /// The points of the line with this name. Lines whose `shared` names are the same have the same style, in `styles`.
    fn points(
        &mut self,
        name: String,
        shared: String,
        look: Look,
        styles: &mut Vec<String>,
    ) -> &mut BTreeMap<u64, f64> {
        let known = self.lines.iter().position(|line| line.name == name);
        let index = known.unwrap_or_else(|| {
            let style = styles.iter().position(|known| *known == shared).unwrap_or_else(|| {
                styles.push(shared);
                styles.len() - 1
            });
            self.lines.push(Line { name, look, style, points: BTreeMap::new() });
            self.lines.len() - 1
        });
        &mut self.lines[index].points
    }

    fn height(&self) -> i32 {
        LEAST_HEIGHT.max(self.lines.len() as i32 * NAME_HEIGHT + TOP + BOTTOM)
    }

    /// Draws the panel on `area` of `root`. The names take `right` pixels at the right.
    fn draw(&self, root: &Area<'_>, area: &Area<'_>, right: i32) -> Result<(), PlotError> {
        let title = format!("{}, quantization {}", self.dtype, self.quant_mode);
        area.draw_text(&title, &text(19, INK, HPos::Left, VPos::Top), (MARGIN, 14))?;

        let (width, height) = area.dim_in_pixel();
        let (width, height) = (width as i32 - right, height as i32);
        let (x, y) = (self.token_range(), self.time_range());
        let ticks = visible_ticks(&self.tokens, &x, width - LEFT);
        let x_axis = (x.start..x.end).log_scale().with_key_points(self.tokens.clone());
        let y_axis = (y.start..y.end).log_scale().with_key_points(time_ticks(y.start, y.end));
        let mut chart = ChartBuilder::on(area)
            .margin_top(TOP)
            .margin_left(MARGIN)
            .margin_right(right)
            .set_label_area_size(LabelAreaPosition::Left, LEFT - MARGIN)
            .set_label_area_size(LabelAreaPosition::Bottom, BOTTOM)
            .build_cartesian_2d(x_axis, y_axis)?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(FRAME)
            .label_style(text(16, SOFT_INK, HPos::Left, VPos::Top))
            .axis_desc_style(text(16, INK, HPos::Left, VPos::Top))
            .x_desc("tokens")
            .y_desc("µs per operation")
            .x_label_formatter(&|x| if ticks.contains(x) { format!("{x:.0}") } else { String::new() })
            .y_label_formatter(&|y| y.to_string())
            .draw()?;

        let pixels = |line: &Line| -> Vec<(i32, i32)> {
            line.points.iter().map(|(&tokens, &time)| chart.backend_coord(&(tokens as f64, time))).collect()
        };
        let lines: Vec<(&Line, Vec<(i32, i32)>)> =
            self.lines.iter().map(|line| (line, pixels(line))).collect();
        // Where lines cross, the fused one is on top.
        for look in [Look::Separate, Look::Peer, Look::Fused] {
            lines
                .iter()
                .filter(|(line, _)| line.look == look)
                .try_for_each(|(line, points)| line.draw(root, points))?;
        }
        let ends = lines.into_iter().map(|(line, points)| (line, points.last().copied())).collect();
        let (left, top) = area.get_base_pixel();
        draw_names(root, ends, left + width, (top + TOP, top + height - BOTTOM))
    }

    /// The range of the token axis, with some room around the token counts.
    fn token_range(&self) -> Range<f64> {
        match (self.tokens.first(), self.tokens.last()) {
            (Some(first), Some(last)) if first < last => {
                let room = (last / first).powf(0.05);
                first / room..last * room
            }
            (Some(only), _) => only / 2.0..only * 2.0,
            (None, _) => 1.0..2.0,
        }
    }

    /// The range of the time axis, with some room around the times. It spans at least a factor of 5, so that small
    /// differences look small and the axis has more than one tick.
    fn time_range(&self) -> Range<f64> {
        let times = || self.lines.iter().flat_map(|line| line.points.values().copied());
        let (least, most) = times().fold((f64::INFINITY, 0.0_f64), |(a, b), time| (a.min(time), b.max(time)));
        if most == 0.0 {
            return 1.0..10.0;
        }
        let room = (5.0 / (most / least)).sqrt().max(1.15);
        least / room..most * room
    }
}

/// Writes the name of every line right of the axis at pixel `x`, between the pixels `bounds`. A name stands as near to the
/// end of its line as the other names allow, and a leader joins them.
fn draw_names(
    root: &Area<'_>,
    mut lines: Vec<(&Line, Option<(i32, i32)>)>,
    x: i32,
    bounds: (i32, i32),
) -> Result<(), PlotError> {
    // From the top, in the order of the lines' ends. Lines without points come last.
    lines.sort_by_key(|(_, end)| end.map_or(i32::MAX, |(_, y)| y));
    let wanted: Vec<i32> = lines.iter().map(|(_, end)| end.map_or(bounds.1, |(_, y)| y)).collect();
    for ((line, end), y) in lines.into_iter().zip(spread(&wanted, bounds)) {
        let color = match end {
            Some(end) => {
                let leader = vec![(end.0 + MARK + 2, end.1), (x + 2, end.1), (x + 20, y), (x + 24, y)];
                root.draw(&PathElement::new(leader, line.color().mix(0.7).stroke_width(1)))?;
                line.mark(root, (x + 30, y))?;
                INK
            }
            None => FAILED,
        };
        let mut style = text(16, color, HPos::Left, VPos::Center);
        if line.look == Look::Fused {
            style.font = style.font.style(FontStyle::Bold);
        }
        root.draw_text(&one_line(&line.label()), &style, (x + JOINT - 6, y))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{
        super::fixture::{self, case, measurement, trials},
        *,
    };

    fn texts(svg: &str) -> Vec<String> {
        let document = roxmltree::Document::parse(svg).unwrap();
        let texts = document.descendants().filter(|node| node.has_tag_name("text"));
        texts.map(|node| node.text().unwrap_or("").trim().to_owned()).collect()
    }

    /// A report in which standard variant `n` takes `n * tokens` and fused variants take `tokens / 2`, plus 20 µs.
    fn scaling(tokens: &[u64]) -> Report {
        let modes = QuantMode::DEFAULT;
        let mut report = fixture::empty(tokens, &modes);
        for &tokens in tokens {
            for mode in modes {
                let names = (1..=9).map(|n| format!("standard_{mode}_variant_{n}"));
                let standard = names.zip(1..).map(|(name, n)| (name, f64::from(n) * tokens as f64));
                let quantization =
                    if mode == QuantMode::None { String::new() } else { format!("_{mode}_quant") };
                let fused = ["oneshot", "twoshot"].map(|name| {
                    (format!("fused_allreduce_rmsnorm{quantization}_{name}"), tokens as f64 / 2.0)
                });
                let rows =
                    standard.chain(fused).map(|(name, time)| measurement(&name, trials(&[time + 20.0])));
                report.push(case(tokens, mode), Vec::new(), rows.collect());
            }
        }
        report
    }

    #[test]
    fn all_lines_are_well_formed_and_name_every_variant_tick_and_unit() {
        let report = scaling(&[128, 512, 1024, 2048]);
        let texts = texts(&to_svg(&report, Lines::All).unwrap());
        for row in report.configurations.iter().flat_map(|configuration| &configuration.rows) {
            let named = texts.iter().filter(|text| text.starts_with(&format!("{}: ", row.variant))).count();
            assert_eq!(named, 1, "{}", row.variant);
        }
        for once_a_panel in ["128", "512", "1024", "2048", "tokens", "µs per operation"] {
            assert_eq!(texts.iter().filter(|text| *text == once_a_panel).count(), 3, "{once_a_panel}");
        }
        assert!(texts.contains(&"bfloat16, quantization fp4".to_owned()));
    }

    /// A report of both kinds, with peers, and with a sharded residual.
    fn with_peers() -> Report {
        let mut report = fixture::empty(&[1, 128], &[QuantMode::Fp8]);
        for tokens in [1, 128] {
            let row = |name: &str, time: f64| measurement(name, trials(&[time * tokens as f64]));
            let rows = vec![
                row(
                    "standard_allreduce_custom_rms_norm_custom_quant_fp8",
                    if tokens == 1 { 9.0 } else { 7.0 },
                ),
                row("standard_allreduce_rmsnorm_fp8_quant_native_compiled", 8.0),
                row("fused_allreduce_rmsnorm_fp8_quant_oneshot", 2.0),
                row("fused_allreduce_rmsnorm_fp8_quant_twoshot", 3.0),
                row("fused_allreduce_rmsnorm_fp8_quant_twoshot_sharded", 2.5),
                row("flashinfer_trtllm_fused_allreduce_rmsnorm_fp8_quant_oneshot", 4.0),
                row("flashinfer_trtllm_fused_allreduce_rmsnorm_fp8_quant_twoshot", 3.5),
                measurement(
                    "torch_standard_allreduce_rmsnorm_fp8_quant_native_compiled",
                    Err("no".to_owned()),
                ),
            ];
            report.push(case(tokens, QuantMode::Fp8), Vec::new(), rows);
        }
        report
    }

    #[test]
    fn what_decides_is_the_fastest_separate_variant_every_fused_one_and_each_peer_at_its_fastest() {
        let texts = texts(&to_svg(&with_peers(), Lines::Deciding).unwrap());
        let labels: Vec<&str> = texts.iter().map(String::as_str).filter(|text| text.contains(": ")).collect();
        // From the top at 128 tokens: the separate operations are the fastest at each token count.
        let expected = [
            "fastest separate: 896.00",
            "flashinfer, fastest: 448.00",
            "fused_twoshot: 384.00",
            "fused_twoshot_sharded: 320.00",
            "fused_oneshot: 256.00",
            "torch, fastest: FAILED",
        ];
        assert_eq!(labels, expected, "{texts:?}");
    }

    #[test]
    fn no_two_lines_of_a_panel_have_colour_and_mark_in_common_and_a_name_keeps_them() {
        let report = scaling(&[128, 512]);
        for (report, lines) in
            [(&report, Lines::All), (&with_peers(), Lines::All), (&with_peers(), Lines::Deciding)]
        {
            let panels = panels(report, lines);
            for panel in &panels {
                let mut styles: Vec<usize> =
                    panel.lines.iter().map(|line| line.style % (MARKS * COLORS.len())).collect();
                styles.sort_unstable();
                styles.dedup();
                assert_eq!(styles.len(), panel.lines.len());
            }
            let styles = |index: usize| {
                let line = |line: &Line| (short_name(&line.name), line.style);
                panels[index].lines.iter().map(line).collect::<BTreeMap<_, _>>()
            };
            for index in 1..panels.len() {
                for (name, style) in styles(index) {
                    assert!(styles(0).get(&name).is_none_or(|known| *known == style), "{name}");
                }
            }
        }
    }

    /// The attribute of the picture's root.
    fn root(svg: &str, attribute: &str) -> u32 {
        let document = roxmltree::Document::parse(svg).unwrap();
        document.root_element().attribute(attribute).unwrap().parse().unwrap()
    }

    #[test]
    fn what_decides_has_the_width_of_a_readme_and_longer_names_have_room() {
        let mut report = with_peers();
        assert_eq!(root(&to_svg(&report, Lines::Deciding).unwrap(), "width"), WIDTH as u32);
        let name = "flashinfer_a_peer_whose_variants_have_names_of_more_characters_than_fit_there_otherwise";
        report.push(case(128, QuantMode::None), Vec::new(), vec![measurement(name, trials(&[12_345.0]))]);
        assert_eq!(root(&to_svg(&report, Lines::Deciding).unwrap(), "width"), WIDTH as u32);
        let wide = root(&to_svg(&report, Lines::All).unwrap(), "width");
        assert!(wide > LEAST_PANEL as u32 + 8 * name.len() as u32, "{wide}");
    }

    #[test]
    fn every_colour_of_the_picture_has_another_on_a_dark_background() {
        let svg = to_svg(&with_peers(), Lines::Deciding).unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let style = document.descendants().find(|node| node.has_tag_name("style")).unwrap().text().unwrap();
        assert!(style.contains("@media (prefers-color-scheme: dark)"), "{style}");
        let mut colors = 0;
        for node in document.descendants() {
            for attribute in ["fill", "stroke"] {
                let Some(color) = node.attribute(attribute).filter(|color| *color != "none") else {
                    continue;
                };
                colors += 1;
                let rule = format!("[{attribute}=\"{color}\"] {{ {attribute}: #");
                assert!(style.contains(&rule), "no {rule} in {style}");
            }
        }
        assert!(colors > 50);
    }

    #[test]
    fn a_single_token_count_shows_its_points() {
        let svg = to_svg(&scaling(&[128]), Lines::Deciding).unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let marks = document
            .descendants()
            .filter(|node| node.has_tag_name("circle") && node.attribute("fill") != Some("none"));
        // A point and a mark at its name, for three lines in each of three panels.
        assert_eq!(marks.count(), 2 * 3 * 3);
        assert!(texts(&svg).contains(&"128".to_owned()));
    }

    #[test]
    fn what_failed_everywhere_is_named_as_failed() {
        let texts = texts(&to_svg(&fixture::report(), Lines::All).unwrap());
        assert!(texts.contains(&"fused_allreduce_rmsnorm_twoshot: FAILED".to_owned()), "{texts:?}");
        assert!(texts.contains(&"fused_allreduce_rmsnorm_oneshot: 125.00".to_owned()), "{texts:?}");
    }

    #[test]
    fn an_empty_report_and_one_of_failures_only_are_pictures_too() {
        let mut report = fixture::empty(&[128], &[QuantMode::None]);
        assert_eq!(texts(&to_svg(&report, Lines::Deciding).unwrap()).len(), 3);
        let failed = vec![measurement("fused", Err("broken".to_owned()))];
        report.push(case(128, QuantMode::None), Vec::new(), failed);
        assert!(texts(&to_svg(&report, Lines::Deciding).unwrap()).contains(&"fused: FAILED".to_owned()));
    }
}
