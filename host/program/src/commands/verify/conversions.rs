//! Every `f32` through a backend's own conversions, compared with `core`'s.
//!
//! `core`'s tests compare its conversions with another implementation, for every `f32`.

use std::ops::Range;

use fused_collective_core::quant::{e2m1, e4m3};
use serde::{Deserialize, Serialize};

use super::{
    settings::Settings,
    verdicts::{Place, Tally, count, gather_groups},
};
use crate::{
    backend::steps::Conversion,
    check::parallel,
    job::ranks::{Error, gather_verdicts},
    report::progress::Progress,
};

/// Blocks of the `f32` bit patterns.
pub const CONVERSION_BLOCKS: u32 = 256;
/// Patterns of a block.
const CONVERSION_BLOCK: u32 = 1 << 24;

/// The result of comparing a block, or a part of one.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Compared {
    compared: u64,
    wrong: u64,
    /// The bits of the first `f32` that is wrong, its code, and `core`'s.
    first: Option<(u32, u8, u8)>,
}

impl Compared {
    fn add(&mut self, other: Compared) {
        self.compared += other.compared;
        self.wrong += other.wrong;
        // The bits come first, so this is the smallest pattern.
        self.first = [self.first, other.first].into_iter().flatten().min();
    }
}

/// Compares the backend's own conversions with `core`'s, for every `f32` of `blocks`, of which there are
/// [`CONVERSION_BLOCKS`]. The ranks of a group share the blocks. All ranks of the job call this, each in a group.
///
/// # Errors
/// A group or the backend failed.
pub fn run_conversions(
    settings: &Settings,
    blocks: Range<u32>,
    place: &mut Place<'_>,
    progress: &Progress,
    mut tell: impl FnMut(&str),
) -> Result<Tally, Error> {
    let mut total = Tally::default();
    for to in Conversion::ALL {
        let title = format!("conversion to {}", to.name());
        progress.doing(title.clone());
        let Some((group, backend)) = &mut place.own else {
            return Err(Error::Failed("conversions need a group on every rank".to_owned()));
        };
        if backend.convert(to, 0, 4)?.is_none() {
            tell("conversions are core's own, which its tests compare for every float32");
            return Ok(total);
        }
        let mut own = Compared::default();
        for first in blocks.clone().step_by(group.world_size() as usize) {
            let block = first + group.rank();
            if blocks.contains(&block) {
                let first = block * CONVERSION_BLOCK;
                let codes = backend.convert(to, first, CONVERSION_BLOCK)?.unwrap_or_default();
                own.add(compare(to, first, &codes, group.world_size()));
            }
            group.barrier()?;
        }
        let mut all = Compared::default();
        for compared in gather_verdicts(group, Ok(own))?.into_iter().flatten() {
            all.add(compared);
        }
        let verdict = match all.first {
            None => Ok(0.0),
            Some((bits, got, right)) => Err(format!(
                "{} of {} float32 differ from core's, the first {bits:#010x}: {got:#04x}, not {right:#04x}",
                all.wrong, all.compared
            )),
        };
        let mut tally = Tally::default();
        let found = gather_groups(place.world, place.group(), &vec![("every float32".to_owned(), verdict)])?;
        count(settings.job.groups, &title, found, &mut tally, &mut tell);
        tell(&format!("{title}: {} float32 compared in each group, {} wrong", all.compared, all.wrong));
        total.add(tally);
    }
    Ok(total)
}

/// Compares the codes of consecutive bit patterns with `core`'s, on this rank's share of the processors.
fn compare(to: Conversion, first: u32, codes: &[u8], ranks: u32) -> Compared {
    let share = codes.len().div_ceil(parallel::processors(ranks)).max(1);
    let per_byte = to.codes_per_byte();
    let parts = codes.chunks(share).enumerate().collect();
    let parts = parallel::map(ranks, parts, |(part, codes): (usize, &[u8])| {
        compare_part(to, first.wrapping_add((part * share) as u32 * per_byte), codes)
    });
    let mut all = Compared::default();
    parts.into_iter().for_each(|part| all.add(part));
    all
}

fn compare_part(to: Conversion, first: u32, codes: &[u8]) -> Compared {
    let mut compared = Compared { compared: 0, wrong: 0, first: None };
    let mut check = |bits: u32, got: u8, right: u8| {
        compared.compared += 1;
        if got != right {
            compared.wrong += 1;
            compared.first = compared.first.or(Some((bits, got, right)));
        }
    };
    for (index, &byte) in (0..).zip(codes) {
        match to {
            Conversion::E4M3 => {
                let bits = first.wrapping_add(index);
                check(bits, byte, e4m3::encode(f32::from_bits(bits)));
            }
            Conversion::E2M1 => {
                let bits = first.wrapping_add(2 * index);
                let [low, high] = e2m1::unpack(byte);
                check(bits, low, e2m1::encode(f32::from_bits(bits)));
                check(bits.wrapping_add(1), high, e2m1::encode(f32::from_bits(bits.wrapping_add(1))));
            }
        }
    }
    compared
}
