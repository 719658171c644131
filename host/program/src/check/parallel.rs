//! Work on every processor of a rank's share. The ranks of a group divide a machine's processors evenly.

use std::{
    num::NonZero,
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    thread,
};

/// The processors of one of `ranks` ranks, at least one.
pub(crate) fn processors(ranks: u32) -> usize {
    let all = thread::available_parallelism().map_or(1, NonZero::get);
    (all / ranks.max(1) as usize).max(1)
}

/// Calls `work` with each of `items` on the [processors](processors) of one of `ranks` ranks. Results are in the order of the
/// items. Threads that cannot be started, for want of memory, leave their work to the others.
pub(crate) fn map<T: Send, R: Send>(ranks: u32, items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let threads = processors(ranks).min(items.len());
    let queue = Mutex::new(items.into_iter().enumerate());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        let mut done = Vec::new();
        while let Some((index, item)) = next() {
            done.push((index, work(item)));
        }
        done
    };
    let mut done = thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, run).ok();
        let others: Vec<_> = (1..threads).filter_map(start).collect();
        let mut done = run();
        for other in others {
            done.extend(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        for count in [0, 1, 1000] {
            let items: Vec<u64> = (0..count).collect();
            assert!(map(1, items.clone(), |item| item * 3).into_iter().eq(items.iter().map(|item| item * 3)));
        }
        assert_eq!(processors(u32::MAX), 1);
    }
}
