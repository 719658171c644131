//! Agreement of the ranks of several hosts before they wait for each other in NCCL: all have NCCL, of one release, and all else
//! that the exchange needs; or none goes on.

use std::sync::Arc;

use fused_collective_core::{launch::LAYOUT, workspace::LIBRARY};

use super::super::nccl::Library;
use crate::{error::Error, group::Bootstrap};

/// Loads NCCL. All ranks call this, and all have it then, of one release, or none.
///
/// # Errors
/// [`Error::Nccl`]: the rank that has none and why, or ranks with different releases; versions of this library that differ.
pub(super) fn load_nccl(bootstrap: &dyn Bootstrap) -> Result<Arc<Library>, Error> {
    let loaded = Library::load();
    let told = match &loaded {
        Ok(library) => told(Ok(&library.version())),
        Err(error) => told(Err(&error.to_string())),
    };
    let all = bootstrap.all_gather(told.as_bytes()).map_err(Error::bootstrap)?;
    let library = loaded?;
    agreed(&all)?;
    Ok(library)
}

/// The line in which a rank tells the others of this library and NCCL.
fn told(nccl: Result<&str, &str>) -> String {
    let (mark, text) = match nccl {
        Ok(version) => ('+', version),
        Err(why) => ('-', why),
    };
    format!("{LIBRARY:x}:{LAYOUT:x}{mark}{text}")
}

/// Compares what all ranks told.
fn agreed(all: &[Vec<u8>]) -> Result<(), Error> {
    let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
    let all: Vec<String> = all.iter().map(text).collect();
    let own = format!("{LIBRARY:x}:{LAYOUT:x}");
    let mut first: Option<&str> = None;
    for (rank, told) in all.iter().enumerate() {
        let Some(nccl) = told.strip_prefix(&own) else {
            return Err(Error::bootstrap(
                format!("rank {rank} runs another version of this library: use one on all hosts").into(),
            ));
        };
        match (nccl.strip_prefix('+'), first) {
            (None, _) => {
                let why = nccl.trim_start_matches("-NCCL ");
                return Err(Error::Nccl(format!("is needed between hosts, and on rank {rank} {why}")));
            }
            (Some(version), Some(other)) if version != other => {
                return Err(Error::Nccl(format!(
                    "is {other} on rank 0 and {version} on rank {rank}: use one release on all hosts"
                )));
            }
            (Some(version), _) => first = Some(version),
        }
    }
    Ok(())
}

/// Tells all ranks whether this one has what the exchange needs, and what they need of it. Returns that, and what each told. All
/// ranks call this, and all go on or none.
///
/// # Errors
/// The own one, unless another rank was lost first; [`Error::Nccl`] with the first rank that has one, and its text; the bootstrap's.
pub(super) fn all_or_none<T>(
    bootstrap: &dyn Bootstrap,
    own: Result<T, Error>,
    tell: impl FnOnce(&T) -> Vec<u8>,
) -> Result<(T, Vec<Vec<u8>>), Error> {
    let told = match &own {
        Ok(own) => [b"+", &tell(own)[..]].concat(),
        Err(error) => format!("-{error}").into_bytes(),
    };
    let all = bootstrap.all_gather(&told).map_err(Error::bootstrap);
    let is_lost = || {
        bootstrap.monitor().and_then(|monitor| monitor.lost()).is_some_and(|it| it.rank != bootstrap.rank())
    };
    let (own, all) = match (own, all) {
        // What failed here may come of the other's end.
        (Err(_), Err(error)) if is_lost() => return Err(error),
        (own, all) => (own?, all?),
    };
    let mut needed = Vec::new();
    for (rank, told) in all.into_iter().enumerate() {
        let Some(told) = told.strip_prefix(b"+") else {
            let why = String::from_utf8_lossy(told.strip_prefix(b"-").unwrap_or_default()).into_owned();
            let why = why.strip_prefix("NCCL ").map_or(format!("failed: {why}"), str::to_owned);
            return Err(Error::Nccl(format!("connects no group, as on rank {rank} it {why}")));
        };
        needed.push(told.to_vec());
    }
    Ok((own, needed))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::group::threads;

    fn of(all: &[String]) -> Result<(), String> {
        let all: Vec<Vec<u8>> = all.iter().map(|told| told.clone().into_bytes()).collect();
        agreed(&all).map_err(|error| error.to_string())
    }

    #[test]
    fn hosts_need_one_release_of_nccl_and_say_where_it_is_missing() {
        let [one, other] = ["2.27.7", "2.28.9"].map(|version| told(Ok(version)));
        assert_eq!(of(&[one.clone(), one.clone()]), Ok(()));
        assert_eq!(
            of(&[one.clone(), one.clone(), other]).unwrap_err(),
            "NCCL is 2.27.7 on rank 0 and 2.28.9 on rank 2: use one release on all hosts"
        );
        let missing = told(Err("NCCL cannot be loaded: NCCL was not found (x): install it"));
        assert_eq!(
            of(&[one.clone(), missing]).unwrap_err(),
            "NCCL is needed between hosts, and on rank 1 cannot be loaded: NCCL was not found (x): install it"
        );
        let old = told(Err("NCCL 2.18.5 is too old: use 2.19.0 or later"));
        assert_eq!(
            of(&[old, one.clone()]).unwrap_err(),
            "NCCL is needed between hosts, and on rank 0 2.18.5 is too old: use 2.19.0 or later"
        );
        let stranger = "1:2+2.27.7".to_owned();
        assert_eq!(
            of(&[one, stranger]).unwrap_err(),
            "rank 1 runs another version of this library: use one on all hosts"
        );
    }

    #[test]
    fn a_rank_that_cannot_join_says_why_and_the_others_name_it() {
        let texts: Vec<String> = std::thread::scope(|scope| {
            let ranks = threads(3, Duration::from_secs(60));
            let join = |thread: crate::group::Thread| {
                let rank = thread.rank();
                let own = if rank == 1 { Err(Error::Unsupported("rows of this length")) } else { Ok(rank) };
                all_or_none(&thread, own, |rank| vec![*rank as u8]).unwrap_err().to_string()
            };
            let ranks: Vec<_> = ranks.into_iter().map(|thread| scope.spawn(move || join(thread))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        let own = Error::Unsupported("rows of this length").to_string();
        let others = format!("NCCL connects no group, as on rank 1 it failed: {own}");
        assert_eq!(texts, [others.clone(), own, others]);
    }

    #[test]
    fn ranks_that_all_can_have_what_each_told() {
        std::thread::scope(|scope| {
            for thread in threads(2, Duration::from_secs(60)) {
                scope.spawn(move || {
                    let rank = thread.rank();
                    let (own, all) = all_or_none(&thread, Ok(rank), |rank| vec![*rank as u8; 3]).unwrap();
                    assert_eq!((own, all), (rank, vec![vec![0; 3], vec![1; 3]]));
                });
            }
        });
    }
}
