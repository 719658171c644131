//! Random inputs, a pure function of seed, tensor and position. So any rank can make the inputs of all ranks to check the
//! sum.

use fused_collective_core::{dtype::Element, reference::Special};

/// A random tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The input of a rank.
    Input(u32),
    /// The residual, the same on all ranks.
    Residual,
    /// RMSNorm's weight.
    Gamma,
    /// The weight of the norm of the sum.
    PostGamma,
    /// The rows of a rank's experts.
    ExpertRows(u32),
    /// The scales of a token's experts on a rank.
    ExpertScales(u32),
}

impl Source {
    fn stream(self) -> u64 {
        match self {
            Source::Residual => 0,
            Source::Gamma => 1,
            Source::Input(rank) => 2 + u64::from(rank),
            Source::PostGamma => 1 << 32,
            Source::ExpertRows(rank) => 2 << 32 | u64::from(rank),
            Source::ExpertScales(rank) => 3 << 32 | u64::from(rank),
        }
    }
}

/// The contents of the tensors of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    /// Seed of the random numbers.
    pub seed: u64,
    /// True if every other row of the inputs holds [special](Special) numbers.
    pub special: bool,
}

impl Numbers {
    /// Random numbers, without special rows.
    pub fn random(seed: u64) -> Self {
        Numbers { seed, special: false }
    }

    /// Fills `row` with row `token` of a tensor.
    pub fn fill_row<E: Element>(self, source: Source, token: u64, row: &mut [E]) {
        match source {
            Source::Input(rank) if self.special && Special::of_token(token) != Special::Ordinary => {
                Special::of_token(token).fill(rank, token, row);
            }
            _ => fill_row(self.seed, source, token, row),
        }
    }
}

/// The row of expert `place` on rank `rank` of `ranks`, or `None` if another rank has it. Places count the experts of all tokens,
/// `top_k` each and `chosen` together, and there are as many rows. Rows are distinct.
///
/// Ranks have a token's experts in turn, so that each reads about as many. Those of one token in 16 are all on one rank.
pub fn expert_row((rank, ranks): (u32, u32), place: u64, top_k: u32, chosen: u64) -> Option<u64> {
    /// A prime above any number of rows: its multiples are all different.
    const STRIDE: u64 = 1_000_000_007;
    let token = place / u64::from(top_k);
    let turn = if token % 16 == 15 { token / 16 } else { place + token };
    let is_here = turn % u64::from(ranks) == u64::from(rank);
    is_here.then(|| place.wrapping_mul(STRIDE).wrapping_add(rank.into()) % chosen)
}

/// Half the width of a uniform distribution of variance 1.
const SQRT_3: f32 = 1.732_050_8;

/// Fills `row` with row `token` of a tensor, uniform with mean 0 and variance 1. One element in 256 is a zero of either
/// sign, whose bits an implementation may lose.
pub fn fill_row<E: Element>(seed: u64, source: Source, token: u64, row: &mut [E]) {
    let first = token.wrapping_mul(row.len() as u64);
    let stream = mix(seed ^ mix(source.stream()));
    for (index, element) in row.iter_mut().enumerate() {
        let bits = mix(stream.wrapping_add(first).wrapping_add(index as u64));
        let uniform = (bits >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
        *element = E::from_f32(match bits & 0x1ff {
            0 => 0.0,
            1 => -0.0,
            _ => uniform * SQRT_3,
        });
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), which makes random numbers from consecutive ones.
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(source: Source, token: u64) -> Vec<f32> {
        let mut row = vec![0.0f32; 65_536];
        fill_row(7, source, token, &mut row);
        row
    }

    #[test]
    fn rows_have_mean_0_variance_1_and_zeros_of_both_signs() {
        let row = rows(Source::Input(3), 5);
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / row.len() as f64;
        let variance = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / row.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
        for sign in [false, true] {
            let zeros = row.iter().filter(|x| **x == 0.0 && x.is_sign_negative() == sign).count();
            assert!((80..180).contains(&zeros), "{zeros} zeros");
        }
    }

    #[test]
    fn experts_have_rows_of_their_own_each_on_one_rank() {
        for (ranks, chosen) in [(2, 8), (2, 8 * 999), (3, 8 * 50), (8, 8 * 128), (11, 8 * 999)] {
            let of = |rank| {
                (0..chosen).map(move |place| expert_row((rank, ranks), place, 8, chosen)).collect::<Vec<_>>()
            };
            let rows: Vec<_> = (0..ranks).map(of).collect();
            for place in 0..chosen as usize {
                assert_eq!(rows.iter().filter(|of_rank| of_rank[place].is_some()).count(), 1, "{place}");
            }
            for of_rank in &rows {
                let mut own: Vec<u64> = of_rank.iter().flatten().copied().collect();
                let count = own.len();
                own.sort_unstable();
                own.dedup();
                assert!(own.len() == count && own.iter().all(|&row| row < chosen));
                // Where ranks divide a token's experts, each has its part of those of the first 15 tokens.
                let first = of_rank[..8.min(chosen as usize)].iter().flatten().count();
                assert!(8 % ranks != 0 || first as u32 == 8 / ranks);
            }
            // All of a token's on one rank.
            let together = (0..chosen / 8).filter(|token| {
                let places = (token * 8) as usize..(token * 8 + 8) as usize;
                rows.iter().any(|of_rank| of_rank[places.clone()].iter().all(Option::is_some))
            });
            assert_eq!(together.count() as u64, chosen / 8 / 16);
        }
    }

    #[test]
    fn tensors_and_rows_differ_and_repeat() {
        assert_eq!(rows(Source::Input(1), 2), rows(Source::Input(1), 2));
        assert_ne!(rows(Source::Input(1), 2), rows(Source::Input(2), 2));
        assert_ne!(rows(Source::Input(1), 2), rows(Source::Input(1), 3));
        assert_ne!(rows(Source::Residual, 0), rows(Source::Gamma, 0));
    }
}
