//! Sums of rows, in vectors.

use fused_collective_core::fusion::Rounding;
use pulp::{Simd, WithSimd, bytemuck};

use super::{
    exchange::{Exchange, Incoming, Medium},
    lanes::{self, WideLine, vectors},
    line::{self, Line},
    rows::{Plain, lines, lines_mut, padded},
};
use crate::group::failure::Failure;

/// `sum += addend`.
#[inline(always)]
pub(super) fn add<E: Plain, S: Simd>(simd: S, sum: &mut WideLine<S>, addend: &WideLine<S>) {
    for (sum, addend) in sum.iter_mut().zip(addend).take(vectors::<S>()) {
        for (sum, addend) in sum[..E::PER_WORD].iter_mut().zip(addend) {
            *sum = simd.add_f32s(*sum, *addend);
        }
    }
}

/// `out = round(row + addend)`. All have the same length.
pub struct AddRow<'a, E> {
    /// `[hidden]`.
    pub row: &'a [E],
    /// `[hidden]`.
    pub addend: &'a [E],
    /// `[hidden]`: the sum.
    pub out: &'a mut [E],
}

impl<E: Plain> WithSimd for AddRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ((row, row_rest), (addend, addend_rest)) = (lines(self.row), lines(self.addend));
        let (out, out_rest) = lines_mut(self.out);
        for ((out, row), addend) in out.iter_mut().zip(row).zip(addend) {
            let mut sum = lanes::widen::<E, S>(simd, row);
            add::<E, S>(simd, &mut sum, &lanes::widen::<E, S>(simd, addend));
            lanes::round::<E, S>(simd, &sum, out);
        }
        if !out_rest.is_empty() {
            let (mut sum, mut rounded) = (lanes::widen::<E, S>(simd, &padded(row_rest)), padded(&[]));
            add::<E, S>(simd, &mut sum, &lanes::widen::<E, S>(simd, &padded(addend_rest)));
            lanes::round::<E, S>(simd, &sum, &mut rounded);
            out_rest.copy_from_slice(&rounded[..out_rest.len()]);
        }
    }
}

/// A tensor that is read, and may be in the memory of the output that takes its place.
#[derive(Clone, Copy, Debug)]
pub enum Operand<T> {
    /// A tensor of its own.
    Apart(T),
    /// The output's memory: `norm_out` for the input, `residual_out` for the residual.
    InPlace,
}

impl<T> Operand<T> {
    /// The same of what `map` makes of a tensor of its own.
    pub(crate) fn map<U>(self, map: impl FnOnce(T) -> U) -> Operand<U> {
        match self {
            Operand::Apart(tensor) => Operand::Apart(map(tensor)),
            Operand::InPlace => Operand::InPlace,
        }
    }
}

/// `out = round(x_0 + x_1 + ... + bias + residual)`, in `f32` in that order. Every rank's addend, and the result, is
/// [stripped](fused_collective_core::lamport::strip), so that the sum is the same whichever rank makes it. All have the
/// same length.
pub(crate) struct SumIncoming<'a, E, M: Medium> {
    pub(crate) exchange: &'a Exchange<M>,
    /// The other ranks' addends, by rank; `None` for this rank's own.
    pub(crate) sources: &'a [Option<Incoming<'a, M>>],
    pub(crate) own: &'a [E],
    /// In place, it is what `out` holds.
    pub(crate) residual: Option<Operand<&'a [E]>>,
    pub(crate) bias: Option<&'a [E]>,
    pub(crate) rounding: Rounding,
    pub(crate) out: &'a mut [E],
}

impl<E: Plain, M: Medium> WithSimd for SumIncoming<'_, E, M> {
    type Output = Result<(), Box<Failure>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let SumIncoming { exchange, sources, own, residual, bias, rounding, out } = self;
        let bias = bias.map(lines);
        let ((own, own_rest), (out, out_rest)) = (lines(own), lines_mut(out));
        let residual = residual.map(|residual| residual.map(lines));
        for (index, (out, own)) in out.iter_mut().zip(own).enumerate() {
            let in_place;
            let residual = match residual {
                Some(Operand::Apart((residual, _))) => Some(&residual[index]),
                Some(Operand::InPlace) => {
                    in_place = *out;
                    Some(&in_place)
                }
                None => None,
            };
            let bias = bias.map(|(bias, _)| &bias[index]);
            sum_line::<E, S, M>(simd, sources, Some(index), own, (bias, residual, rounding), out)?;
        }
        if !out_rest.is_empty() {
            let residual = residual.map(|residual| match residual {
                Operand::Apart((_, rest)) => padded(rest),
                Operand::InPlace => padded(out_rest),
            });
            let mut sum = padded(&[]);
            sum_line::<E, S, M>(
                simd,
                sources,
                None,
                &padded(own_rest),
                (bias.map(|(_, rest)| padded(rest)).as_ref(), residual.as_ref(), rounding),
                &mut sum,
            )?;
            out_rest.copy_from_slice(&sum[..out_rest.len()]);
        }
        exchange.received();
        Ok(())
    }
}

/// Line `index`, or what follows the last one.
#[inline(always)]
fn sum_line<E: Plain, S: Simd, M: Medium>(
    simd: S,
    sources: &[Option<Incoming<'_, M>>],
    index: Option<usize>,
    own: &Line,
    (bias, residual, rounding): (Option<&Line>, Option<&Line>, Rounding),
    out: &mut Line,
) -> Result<(), Box<Failure>> {
    let Some((first, others)) = sources.split_first() else { return Ok(()) };
    let mut words = [0; line::WORDS];
    // Added to zero, the first would lose the sign of its own.
    let mut sum = match first {
        Some(incoming) => {
            take(incoming, index, &mut words)?;
            lanes::widen::<E, S>(simd, bytemuck::cast_ref(&words))
        }
        None => lanes::widen_stripped::<E, S>(simd, own),
    };
    for source in others {
        let addend = match source {
            Some(incoming) => {
                take(incoming, index, &mut words)?;
                lanes::widen::<E, S>(simd, bytemuck::cast_ref(&words))
            }
            None => lanes::widen_stripped::<E, S>(simd, own),
        };
        add::<E, S>(simd, &mut sum, &addend);
    }
    if let Some(bias) = bias {
        add::<E, S>(simd, &mut sum, &lanes::widen::<E, S>(simd, bias));
    }
    if let Some(residual) = residual {
        if rounding == Rounding::AfterAllReduce {
            let mut rounded = padded(&[]);
            lanes::round::<E, S>(simd, &sum, &mut rounded);
            sum = lanes::widen::<E, S>(simd, &rounded);
        }
        add::<E, S>(simd, &mut sum, &lanes::widen::<E, S>(simd, residual));
    }
    lanes::round_stripped::<E, S>(simd, &sum, out);
    Ok(())
}

#[inline(always)]
fn take<M: Medium>(
    incoming: &Incoming<'_, M>,
    index: Option<usize>,
    words: &mut [u64; line::WORDS],
) -> Result<(), Box<Failure>> {
    match index {
        Some(index) => incoming.take_line(index, words),
        None => incoming.take_rest(words),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsFd, time::Duration};

    use fused_collective_core::{
        dtype::{Element, bf16, f16},
        lamport,
        workspace::{Header, Layout},
    };
    use pulp::Arch;
    use zerocopy::IntoBytes as _;

    use super::*;
    use crate::{
        cpu::{region::Regions, rows::tests::row, wait::WaitGuard},
        group::failure::What,
        group::shared_memory::SharedMemory,
    };

    fn stripped<E: Plain>(row: &[E]) -> Vec<E> {
        let mut row = row.to_vec();
        for word in row.as_mut_bytes().as_chunks_mut().0 {
            *word = lamport::strip(u32::from_ne_bytes(*word)).to_ne_bytes();
        }
        row
    }

    /// The rounded sums of elements, in order.
    fn sums<E: Plain>(addends: &[Vec<E>]) -> Vec<E> {
        let sum = |index: usize| {
            E::from_f32(
                addends.iter().map(|row| row[index].to_f32()).reduce(|sum, value| sum + value).unwrap(),
            )
        };
        (0..addends[0].len()).map(sum).collect()
    }

    #[track_caller]
    fn assert_same<E: Element>(found: &[E], expected: &[E], what: &str) {
        for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
            // Which of two NaN an addition keeps is nobody's promise.
            let nan = found.to_f32().is_nan() && expected.to_f32().is_nan();
            assert!(
                nan || found.to_bits() == expected.to_bits(),
                "{} {what}, element {index}: {found:?}, not {expected:?}",
                E::DTYPE
            );
        }
    }

    fn check_sums<E: Plain>(arch: Arch) {
        for hidden in (2..=208).step_by(2) {
            let (first, second) = (row::<E>(0, hidden), row::<E>(1, hidden));
            let mut out = vec![E::default(); hidden];
            arch.dispatch(AddRow { row: &first, addend: &second, out: &mut out });
            assert_same(&out, &sums(&[first, second]), &format!("row of {hidden}"));
        }
    }

    /// Rank 1's sum of rows that the others have sent.
    fn check_incoming<E: Plain>(arch: Arch, ranks: u32) {
        const RANK: u32 = 1;
        let layout = Layout::new(ranks, 1 << 14).unwrap();
        let memory = SharedMemory::create(layout.total_bytes()).unwrap();
        let exchange = |rank| {
            let guard = WaitGuard { rank, deadline: Duration::from_secs(10), monitor: None, log: None };
            Exchange::new(Regions::map(memory.as_fd(), layout).unwrap(), guard)
        };
        let mut exchanges: Vec<Exchange> = (0..ranks).map(exchange).collect();
        for (hidden, with_residual) in
            (4..=208).step_by(4).flat_map(|hidden| [(hidden, false), (hidden, true)])
        {
            let rows: Vec<Vec<E>> = (0..ranks as usize).map(|number| row(number, hidden)).collect();
            let residual = with_residual.then(|| row::<E>(20, hidden));
            let bytes = hidden * size_of::<E>();
            let at = |source: u32| u64::from(source) * bytes as u64;
            for source in (0..ranks).filter(|&source| source != RANK) {
                let exchange = &exchanges[source as usize];
                let row = rows[source as usize].as_bytes();
                exchange.send_stripped(exchange.operation(), RANK, at(source), row);
            }
            let exchange = &exchanges[RANK as usize];
            let incoming = |source| {
                (source != RANK).then(|| exchange.incoming(source, What::Input(0), at(source), bytes))
            };
            let sources: Vec<_> = (0..ranks).map(incoming).collect();
            let mut out = vec![E::default(); hidden];
            let own = &rows[RANK as usize][..];
            let residual = residual.as_deref();
            let in_place = hidden % 8 == 0;
            if let Some(residual) = residual.filter(|_| in_place) {
                out.copy_from_slice(residual);
            }
            let bias = (hidden % 10 == 0).then(|| row::<E>(99, hidden));
            let rounding = if hidden % 12 == 0 { Rounding::AfterAllReduce } else { Rounding::Once };
            let operand = |residual| if in_place { Operand::InPlace } else { Operand::Apart(residual) };
            arch.dispatch(SumIncoming {
                exchange,
                sources: &sources,
                own,
                residual: residual.map(operand),
                bias: bias.as_deref(),
                rounding,
                out: &mut out,
            })
            .unwrap();
            let mut addends: Vec<Vec<E>> = rows.iter().map(|row| stripped(row)).collect();
            addends.extend(bias.clone());
            if rounding == Rounding::AfterAllReduce {
                addends = vec![sums(&addends)];
            }
            addends.extend(residual.map(<[E]>::to_vec));
            assert_same(&out, &stripped(&sums(&addends)), &format!("{ranks} rows of {hidden}"));
            exchanges.iter_mut().for_each(Exchange::advance);
        }
        // Every word that was read is empty again.
        let header = Header { world_size: ranks, rank: RANK, slot_bytes: layout.slot_bytes() };
        exchanges[RANK as usize].publish_header(header);
        assert_eq!(exchanges[RANK as usize].find_stray_write(header), None);
    }

    #[test]
    fn rows_of_every_length_are_added_as_elements_are() {
        for arch in [Arch::Scalar, Arch::new()] {
            check_sums::<f32>(arch);
            check_sums::<f16>(arch);
            check_sums::<bf16>(arch);
        }
    }

    #[test]
    fn rows_that_come_in_are_summed_in_rank_order_and_leave_their_places_empty() {
        for (arch, ranks) in [(Arch::Scalar, 2), (Arch::new(), 2), (Arch::new(), 5)] {
            check_incoming::<f32>(arch, ranks);
            check_incoming::<f16>(arch, ranks);
            check_incoming::<bf16>(arch, ranks);
        }
    }
}
