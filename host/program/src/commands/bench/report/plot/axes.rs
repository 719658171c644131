//! Places along the axes of a plot: ticks whose labels have room, and names that stay apart.

use std::ops::Range;

/// Distance from one name to the next.
pub(super) const NAME_HEIGHT: i32 = 19;

/// Round times from `from` to `to`. The fewer powers of ten there are, the more ticks has each.
pub(super) fn time_ticks(from: f64, to: f64) -> Vec<f64> {
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
pub(super) fn visible_ticks(tokens: &[f64], range: &Range<f64>, pixels: i32) -> Vec<f64> {
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
pub(super) fn spread(wanted: &[i32], (top, bottom): (i32, i32)) -> Vec<i32> {
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
    use super::*;

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
