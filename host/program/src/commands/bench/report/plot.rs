//! The report as a plot: time over tokens, log-log, one panel for each element type and quantization mode.
//!
//! A line is a variant, with its name at the end. Fused variants are solid and strong, standard ones dashed and muted, so
//! that a glance shows the faster kind. A variant that failed everywhere has no line, and its name says FAILED.

use std::{io, ops::Range};

use fused_collective_core::dtype::DType;
use plotters::{
    coord::{Shift, combinators::BindKeyPoints},
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::data::Report;
use crate::{measurement::Kind, quant_mode::QuantMode};

/// A drawing error. Drawing into memory hardly has any.
pub type PlotError = DrawingAreaErrorKind<io::Error>;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Width of a panel, without the names to the right.
const PANEL_WIDTH: i32 = 550;
const HEADING_HEIGHT: u32 = 74;
/// Margin around the plot.
const MARGIN: i32 = 20;
/// Width of the time labels, left of a panel's axis.
const LEFT: i32 = 84;
/// Least width of the variants' names, right of a panel's axis.
const LEAST_RIGHT: i32 = 490;
/// Width of a character of a name in bold, and of the leader from a line to its name.
const CHARACTER: f64 = 8.4;
const JOINT: i32 = 34;
/// Space above and below a panel's axes.
const TOP: i32 = 40;
const BOTTOM: i32 = 50;
/// Distance from one name to the next.
const NAME_HEIGHT: i32 = 19;

const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(0x22, 0x26, 0x2b);
const SOFT_INK: RGBColor = RGBColor(0x5c, 0x63, 0x6b);
const GRID: RGBColor = RGBColor(0xe3, 0xe6, 0xea);
const FRAME: RGBColor = RGBColor(0xb4, 0xba, 0xc2);
const FAILED: RGBColor = RGBColor(0xb4, 0x23, 0x18);
/// The colours of a panel's fused variants, in turn.
const FUSED: [RGBColor; 4] = [
    RGBColor(0x0b, 0x5f, 0xd7),
    RGBColor(0xe0, 0x4f, 0x1d),
    RGBColor(0x0c, 0x8a, 0x57),
    RGBColor(0x86, 0x3c, 0xb8),
];
/// The colours of a panel's standard variants, in turn.
const STANDARD: [RGBColor; 6] = [
    RGBColor(0x7b, 0x84, 0x8f),
    RGBColor(0xa8, 0x83, 0x4d),
    RGBColor(0x5e, 0x95, 0x97),
    RGBColor(0xa0, 0x7d, 0xa3),
    RGBColor(0x86, 0x98, 0x5f),
    RGBColor(0xb3, 0x80, 0x7c),
];

/// One variant in a panel.
struct Line<'a> {
    variant: &'a str,
    kind: Kind,
    color: RGBColor,
    /// Tokens and median microseconds, by tokens; empty if it failed everywhere.
    points: Vec<(f64, f64)>,
}

impl Line<'_> {
    /// The variant's name, with the last time of its line.
    fn label(&self) -> String {
        match self.points.last() {
            Some((_, time)) => format!("{}: {time:.2}", self.variant),
            None => format!("{}: FAILED", self.variant),
        }
    }
}

struct Panel<'a> {
    dtype: DType,
    quant_mode: QuantMode,
    /// Token counts, ascending.
    tokens: Vec<f64>,
    lines: Vec<Line<'a>>,
}

/// The plot as SVG.
pub fn to_svg(report: &Report) -> Result<String, PlotError> {
    let panels = panels(report);
    // A column for each element type, a row for each quantization mode.
    let mut dtypes: Vec<DType> = Vec::new();
    let mut modes: Vec<QuantMode> = Vec::new();
    for panel in &panels {
        if !dtypes.contains(&panel.dtype) {
            dtypes.push(panel.dtype);
        }
        if !modes.contains(&panel.quant_mode) {
            modes.push(panel.quant_mode);
        }
    }
    let most_lines = panels.iter().map(|panel| panel.lines.len()).max().unwrap_or(0) as u32;
    let height = 400.max(most_lines * NAME_HEIGHT as u32 + (TOP + BOTTOM) as u32);
    let longest = panels.iter().flat_map(|panel| &panel.lines).map(|line| line.label().chars().count()).max();
    let right = ((longest.unwrap_or(0) as f64 * CHARACTER) as i32 + JOINT).max(LEAST_RIGHT);
    let width = (PANEL_WIDTH + right) as u32;
    let size = (width * dtypes.len().max(1) as u32, HEADING_HEIGHT + height * modes.len() as u32);

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        heading(&root, report)?;
        for panel in &panels {
            let column = dtypes.iter().position(|dtype| *dtype == panel.dtype).unwrap_or(0) as u32;
            let row = modes.iter().position(|mode| *mode == panel.quant_mode).unwrap_or(0) as u32;
            let area = root.clone().shrink((column * width, HEADING_HEIGHT + row * height), (width, height));
            panel.draw(&root, &area, right)?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn panels(report: &Report) -> Vec<Panel<'_>> {
    let mut panels: Vec<Panel<'_>> = Vec::new();
    for configuration in &report.configurations {
        let (dtype, quant_mode) = (configuration.dtype, configuration.quant_mode);
        let known = panels.iter().position(|panel| (panel.dtype, panel.quant_mode) == (dtype, quant_mode));
        let index = known.unwrap_or_else(|| {
            panels.push(Panel { dtype, quant_mode, tokens: Vec::new(), lines: Vec::new() });
            panels.len() - 1
        });
        let panel = &mut panels[index];
        let tokens = configuration.num_tokens as f64;
        panel.tokens.push(tokens);
        for row in &configuration.rows {
            let line = panel.line(&row.variant, row.kind);
            line.points.extend(row.figures().map(|figures| (tokens, figures.median_us)));
        }
    }
    for panel in &mut panels {
        panel.tokens.sort_by(f64::total_cmp);
        panel.tokens.dedup();
        for line in &mut panel.lines {
            line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
    }
    panels
}

fn text(size: u32, color: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    (FONT, size).into_font().color(&color).pos(Pos::new(h, v))
}

fn heading(root: &Area<'_>, report: &Report) -> Result<(), PlotError> {
    let Report { backend, world_size, settings, .. } = report;
    let residual = if settings.use_residual { "with residual" } else { "no residual" };
    let title = "Fused all-reduce + RMSNorm + quantization against separate operations";
    let facts = format!(
        "{backend} backend, {world_size} ranks, hidden size {}, {residual}; median of {} trials, slowest rank",
        settings.hidden_dim, settings.trials
    );
    root.draw_text(title, &text(23, INK, HPos::Left, VPos::Top), (MARGIN, 12))?;
    root.draw_text(&facts, &text(16, SOFT_INK, HPos::Left, VPos::Top), (MARGIN, 36))?;
    root.draw_text(&report.machine.summary(), &text(16, SOFT_INK, HPos::Left, VPos::Top), (MARGIN, 54))
}

impl<'a> Panel<'a> {
    fn line(&mut self, variant: &'a str, kind: Kind) -> &mut Line<'a> {
        let known = self.lines.iter().position(|line| line.variant == variant);
        let index = known.unwrap_or_else(|| {
            let before = self.lines.iter().filter(|line| line.kind == kind).count();
            let color = match kind {
                Kind::Fused => FUSED[before % FUSED.len()],
                Kind::Standard => STANDARD[before % STANDARD.len()],
            };
            self.lines.push(Line { variant, kind, color, points: Vec::new() });
            self.lines.len() - 1
        });
        &mut self.lines[index]
    }

    /// Draws the panel on `area` of `root`. The names take `right` pixels at the right.
    fn draw(&self, root: &Area<'_>, area: &Area<'_>, right: i32) -> Result<(), PlotError> {
        let title = format!("{}, quantization {}", self.dtype, self.quant_mode);
        area.draw_text(&title, &text(18, INK, HPos::Left, VPos::Top), (MARGIN, 14))?;

        let (x, y) = (self.token_range(), self.time_range());
        let ticks = visible_ticks(&self.tokens, &x, PANEL_WIDTH - LEFT);
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
            .label_style(text(14, SOFT_INK, HPos::Left, VPos::Top))
            .axis_desc_style(text(15, INK, HPos::Left, VPos::Top))
            .x_desc("tokens")
            .y_desc("µs per operation")
            .x_label_formatter(&|x| if ticks.contains(x) { format!("{x:.0}") } else { String::new() })
            .y_label_formatter(&|y| y.to_string())
            .draw()?;

        // Standard lines first: where lines cross, the fused one is on top.
        let by_kind = |kind| self.lines.iter().filter(move |line| line.kind == kind);
        for line in by_kind(Kind::Standard) {
            let style = line.color.stroke_width(2);
            chart.draw_series(DashedLineSeries::new(line.points.iter().copied(), 7, 5, style))?;
            let hollow = line.points.iter().map(|&point| Circle::new(point, 3, WHITE.filled()));
            chart.draw_series(hollow)?;
            let rim = line.points.iter().map(|&point| Circle::new(point, 3, line.color.stroke_width(2)));
            chart.draw_series(rim)?;
        }
        for line in by_kind(Kind::Fused) {
            chart.draw_series(LineSeries::new(line.points.iter().copied(), line.color.stroke_width(3)))?;
            let dots = line.points.iter().map(|&point| Circle::new(point, 4, line.color.filled()));
            chart.draw_series(dots)?;
        }

        let ends: Vec<_> = self
            .lines
            .iter()
            .map(|line| line.points.last().map(|point| chart.backend_coord(point)))
            .collect();
        let ((left, top), height) = (area.get_base_pixel(), area.dim_in_pixel().1 as i32);
        self.draw_names(root, &ends, left + PANEL_WIDTH, (top + TOP, top + height - BOTTOM))
    }

    /// Writes every variant's name right of the axis at pixel `x`, between the pixels `bounds`. A name stands as near to
    /// the end of its line as the other names allow, and a leader joins them.
    fn draw_names(
        &self,
        root: &Area<'_>,
        ends: &[Option<(i32, i32)>],
        x: i32,
        bounds: (i32, i32),
    ) -> Result<(), PlotError> {
        let mut lines: Vec<_> = self.lines.iter().zip(ends).collect();
        // From the top, in the order of the lines' ends. Variants without a line come last.
        lines.sort_by_key(|(_, end)| end.map_or(i32::MAX, |(_, y)| y));
        let wanted: Vec<i32> = lines.iter().map(|(_, end)| end.map_or(bounds.1, |(_, y)| y)).collect();
        for ((line, end), y) in lines.into_iter().zip(spread(&wanted, bounds)) {
            let color = match end {
                Some(end) => {
                    let leader = vec![(end.0 + 6, end.1), (x + 2, end.1), (x + 20, y), (x + 24, y)];
                    root.draw(&PathElement::new(leader, line.color.mix(0.7).stroke_width(1)))?;
                    line.color
                }
                None => FAILED,
            };
            let mut style = text(15, color, HPos::Left, VPos::Center);
            if line.kind == Kind::Fused {
                style.font = style.font.style(FontStyle::Bold);
            }
            root.draw_text(&line.label(), &style, (x + 28, y))?;
        }
        Ok(())
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
        let times = || self.lines.iter().flat_map(|line| line.points.iter().map(|point| point.1));
        let (least, most) = times().fold((f64::INFINITY, 0.0_f64), |(a, b), time| (a.min(time), b.max(time)));
        if most == 0.0 {
            return 1.0..10.0;
        }
        let room = (5.0 / (most / least)).sqrt().max(1.15);
        least / room..most * room
    }
}

/// Round times from `from` to `to`. The fewer powers of ten there are, the more ticks has each.
fn time_ticks(from: f64, to: f64) -> Vec<f64> {
    let decades = from.log10().floor() as i32..=to.log10().ceil() as i32;
    let steps: &[f64] = match to / from {
        ratio if ratio < 20.0 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
        ratio if ratio < 1e5 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    // A power of ten is exact as a quotient where it would not be as a product.
    let power = |n: i32, step: f64| if n < 0 { step / 10_f64.powi(-n) } else { step * 10_f64.powi(n) };
    let ticks = decades.flat_map(|n| steps.iter().map(move |&step| power(n, step)));
    ticks.filter(|tick| (from..=to).contains(tick)).collect()
}

/// The token counts whose labels do not overlap the one before, on an axis of `pixels`.
fn visible_ticks(tokens: &[f64], range: &Range<f64>, pixels: i32) -> Vec<f64> {
    const DIGIT: f64 = 8.0;
    let place =
        |tokens: f64| (tokens / range.start).ln() / (range.end / range.start).ln() * f64::from(pixels);
    let half_width = |tokens: f64| (tokens.log10().floor() + 1.0) * DIGIT / 2.0;
    let mut ticks: Vec<f64> = Vec::new();
    for &count in tokens {
        let fits =
            |&last: &f64| place(count) - place(last) > half_width(last) + half_width(count) + DIGIT / 2.0;
        if ticks.last().is_none_or(fits) {
            ticks.push(count);
        }
    }
    ticks
}

/// Moves the ascending places `wanted` so that neighbours are [`NAME_HEIGHT`] apart and, if there is room, within the
/// bounds.
fn spread(wanted: &[i32], (top, bottom): (i32, i32)) -> Vec<i32> {
    let mut places = wanted.to_vec();
    let mut least = top;
    for place in &mut places {
        *place = (*place).max(least);
        least = *place + NAME_HEIGHT;
    }
    let mut most = bottom;
    for place in places.iter_mut().rev() {
        *place = (*place).min(most);
        most = *place - NAME_HEIGHT;
    }
    places
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
        let modes = QuantMode::ALL;
        let mut report = fixture::empty(tokens, &modes);
        for &tokens in tokens {
            for mode in modes {
                let names = (1..=5).map(|n| format!("standard_{mode}_variant_{n}"));
                let standard = names.zip(1..).map(|(name, n)| (name, f64::from(n) * tokens as f64));
                let fused =
                    ["oneshot", "twoshot"].map(|name| (format!("fused_{mode}_{name}"), tokens as f64 / 2.0));
                let rows =
                    standard.chain(fused).map(|(name, time)| measurement(&name, trials(&[time + 20.0])));
                report.push(case(tokens, mode), Vec::new(), rows.collect());
            }
        }
        report
    }

    #[test]
    fn it_is_well_formed_and_names_every_variant_tick_and_unit() {
        let report = scaling(&[128, 512, 1024, 2048]);
        let texts = texts(&to_svg(&report).unwrap());
        for row in report.configurations.iter().flat_map(|configuration| &configuration.rows) {
            let named = texts.iter().filter(|text| text.starts_with(&format!("{}: ", row.variant))).count();
            assert_eq!(named, 1, "{}", row.variant);
        }
        for once_a_panel in ["128", "512", "1024", "2048", "tokens", "µs per operation"] {
            assert_eq!(texts.iter().filter(|text| *text == once_a_panel).count(), 3, "{once_a_panel}");
        }
        assert!(texts.contains(&"bfloat16, quantization fp4".to_owned()));
    }

    #[test]
    fn a_single_token_count_shows_its_points() {
        let report = scaling(&[128]);
        let svg = to_svg(&report).unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap();
        let dots = document
            .descendants()
            .filter(|node| node.has_tag_name("circle") && node.attribute("r") == Some("4"));
        assert_eq!(dots.count(), 6);
        assert!(texts(&svg).contains(&"128".to_owned()));
    }

    #[test]
    fn a_long_name_has_room_right_of_its_line() {
        let width = |svg: &str| {
            roxmltree::Document::parse(svg)
                .unwrap()
                .root_element()
                .attribute("width")
                .unwrap()
                .parse()
                .unwrap()
        };
        let mut report = scaling(&[128]);
        let usual: u32 = width(&to_svg(&report).unwrap());
        assert_eq!(usual, (PANEL_WIDTH + LEAST_RIGHT) as u32);
        let name = "a_peer_whose_variants_have_names_of_more_characters_than_fit_there_otherwise";
        report.push(case(128, QuantMode::None), Vec::new(), vec![measurement(name, trials(&[12_345.0]))]);
        let wide: u32 = width(&to_svg(&report).unwrap());
        assert!(wide > usual + 8 * (name.len() as u32 - 60), "{wide}");
    }

    #[test]
    fn what_failed_everywhere_is_named_as_failed() {
        let texts = texts(&to_svg(&fixture::report()).unwrap());
        assert!(texts.contains(&"fused_allreduce_rmsnorm_twoshot: FAILED".to_owned()), "{texts:?}");
        assert!(texts.contains(&"fused_allreduce_rmsnorm_oneshot: 125.00".to_owned()), "{texts:?}");
    }

    #[test]
    fn an_empty_report_and_one_of_failures_only_are_pictures_too() {
        let mut report = fixture::empty(&[128], &[QuantMode::None]);
        assert_eq!(texts(&to_svg(&report).unwrap()).len(), 3);
        let failed = vec![measurement("fused", Err("broken".to_owned()))];
        report.push(case(128, QuantMode::None), Vec::new(), failed);
        assert!(texts(&to_svg(&report).unwrap()).contains(&"fused: FAILED".to_owned()));
    }

    #[test]
    fn names_stay_apart_and_inside() {
        assert_eq!(spread(&[], (0, 100)), [0; 0]);
        assert_eq!(spread(&[10, 50], (0, 100)), [10, 50]);
        assert_eq!(spread(&[10, 10, 10], (0, 100)), [10, 29, 48]);
        assert_eq!(spread(&[95, 99, 100], (0, 100)), [62, 81, 100]);
        assert_eq!(spread(&[-5, 0], (0, 100)), [0, 19]);
    }

    #[test]
    fn time_ticks_are_round() {
        assert_eq!(time_ticks(0.2, 3.0), [0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0]);
        assert_eq!(time_ticks(9.0, 1100.0), [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]);
        assert_eq!(time_ticks(0.9, 1.1e6), [1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6]);
    }

    #[test]
    fn token_labels_do_not_overlap() {
        let tokens = [1.0, 2.0, 3.0, 4.0, 100.0, 101.0];
        assert_eq!(visible_ticks(&tokens, &(1.0..128.0), 460), [1.0, 2.0, 3.0, 4.0, 100.0]);
    }
}
