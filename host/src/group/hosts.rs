//! The hosts of a group, and the bootstrap of the ranks of one of them.

use std::{fmt, sync::Arc};

use super::bootstrap::{Bootstrap, BootstrapError, Monitor};

/// The hosts of a group, each with as many ranks. Hosts are numbered in the order of their first rank, and a rank's *place* is
/// its number among the ranks of its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hosts {
    /// The ranks of each host.
    members: Vec<Vec<u32>>,
    host: u32,
    place: u32,
}

impl Hosts {
    /// Meets the ranks of `bootstrap`, each of which [names](Bootstrap::host) its host. All ranks call this.
    ///
    /// # Errors
    /// A host cannot be named, or hosts have different numbers of ranks; the bootstrap's.
    pub fn meet(bootstrap: &dyn Bootstrap) -> Result<Hosts, BootstrapError> {
        let own = bootstrap.host();
        // Without one, this rank still answers the others, which would wait for it.
        let told = own.as_deref().map_or_else(|_| Vec::new(), |name| [&[1], name].concat());
        let names = bootstrap.all_gather(&told)?;
        own?;
        Hosts::of(&names, bootstrap.rank())
    }

    /// One host of all ranks.
    pub fn one(rank: u32, world_size: u32) -> Hosts {
        Hosts { members: vec![(0..world_size).collect()], host: 0, place: rank }
    }

    /// The hosts of ranks that gave these names, as rank `rank` has them. A rank without a host gave an empty one.
    pub(super) fn of<N: AsRef<[u8]>>(names: &[N], rank: u32) -> Result<Hosts, BootstrapError> {
        let mut hosts: Vec<(&[u8], Vec<u32>)> = Vec::new();
        let mut own = (0, 0);
        for (of, name) in (0..).zip(names) {
            let name = name.as_ref();
            if name.is_empty() {
                return Err(NoGroup(format!("rank {of} cannot name its host")).into());
            }
            let index = hosts.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
                hosts.push((name, Vec::new()));
                hosts.len() - 1
            });
            let members = &mut hosts[index].1;
            if of == rank {
                own = (index as u32, members.len() as u32);
            }
            members.push(of);
        }
        let members: Vec<Vec<u32>> = hosts.into_iter().map(|(_, members)| members).collect();
        let most = members.iter().map(Vec::len).max().unwrap_or(0);
        if let Some(fewer) = members.iter().position(|ranks| ranks.len() < most) {
            let more = members.iter().position(|ranks| ranks.len() == most).unwrap_or(0);
            let [fewer, more] = [&members[fewer], &members[more]];
            return Err(NoGroup(format!(
                "hosts have different numbers of ranks: {} on the host of rank {}, {} on that of rank {}: start as many on \
                 each",
                more.len(),
                more[0],
                fewer.len(),
                fewer[0]
            ))
            .into());
        }
        Ok(Hosts { members, host: own.0, place: own.1 })
    }

    /// Hosts of the group.
    pub fn count(&self) -> u32 {
        self.members.len() as u32
    }

    /// Ranks of each host.
    pub fn ranks_per_host(&self) -> u32 {
        self.members.first().map_or(0, Vec::len) as u32
    }

    /// This rank's host.
    pub fn host(&self) -> u32 {
        self.host
    }

    /// This rank's place.
    pub fn place(&self) -> u32 {
        self.place
    }

    /// True if `rank` is on this rank's host.
    pub fn is_own(&self, rank: u32) -> bool {
        self.members[self.host as usize].contains(&rank)
    }

    /// The rank at a place of a host. Both are there.
    pub fn rank_at(&self, host: u32, place: u32) -> u32 {
        self.members[host as usize][place as usize]
    }

    /// All ranks, one host's after the other's: the order in which they are summed.
    pub fn in_order(&self) -> impl Iterator<Item = u32> + '_ {
        self.members.iter().flatten().copied()
    }

    /// The ranks of this rank's host as a group of their own.
    pub(crate) fn within<'a>(&'a self, bootstrap: &'a dyn Bootstrap) -> WithinHost<'a> {
        WithinHost { bootstrap, hosts: self }
    }
}

/// Ranks that do not form a group.
#[derive(Debug)]
struct NoGroup(String);

impl fmt::Display for NoGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoGroup {}

/// The ranks of one host, over the bootstrap of all: every rank of every host makes the same calls in the same order.
///
/// Its monitor is that of the whole group, whose ranks it names.
pub(crate) struct WithinHost<'a> {
    bootstrap: &'a dyn Bootstrap,
    hosts: &'a Hosts,
}

impl Bootstrap for WithinHost<'_> {
    fn rank(&self) -> u32 {
        self.hosts.place
    }

    fn world_size(&self) -> u32 {
        self.hosts.ranks_per_host()
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BootstrapError> {
        let mut all = self.bootstrap.all_gather(bytes)?;
        let members = &self.hosts.members[self.hosts.host as usize];
        members
            .iter()
            .map(|&rank| all.get_mut(rank as usize).map(std::mem::take))
            .collect::<Option<_>>()
            .ok_or_else(|| {
                NoGroup(format!("the bootstrap gave the bytes of {} ranks only", all.len())).into()
            })
    }

    fn host(&self) -> Result<Vec<u8>, BootstrapError> {
        self.bootstrap.host()
    }

    fn monitor(&self) -> Option<Arc<dyn Monitor>> {
        self.bootstrap.monitor()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _, os::fd::AsFd as _, thread, time::Duration};

    use super::{super::threads, *};

    fn names(names: &[&str]) -> Vec<Vec<u8>> {
        names.iter().map(|name| name.as_bytes().to_vec()).collect()
    }

    #[test]
    fn hosts_are_numbered_by_their_first_rank_and_places_by_rank() {
        let names = names(&["b", "a", "a", "b", "c", "c"]);
        let of = |rank| Hosts::of(&names, rank).unwrap();
        let seats = (0..6).map(|rank| (of(rank).host(), of(rank).place())).collect::<Vec<_>>();
        assert_eq!(seats, [(0, 0), (1, 0), (1, 1), (0, 1), (2, 0), (2, 1)]);
        let hosts = of(4);
        assert_eq!((hosts.count(), hosts.ranks_per_host()), (3, 2));
        assert_eq!(hosts.in_order().collect::<Vec<_>>(), [0, 3, 1, 2, 4, 5]);
        assert_eq!((hosts.rank_at(0, 1), hosts.rank_at(2, 0)), (3, 4));
    }

    #[test]
    fn hosts_with_different_numbers_of_ranks_are_refused_with_the_numbers() {
        let error = Hosts::of(&names(&["a", "a", "b", "b", "b", "a", "c"]), 0).unwrap_err().to_string();
        assert_eq!(
            error,
            "hosts have different numbers of ranks: 3 on the host of rank 0, 1 on that of rank 6: start as many on each"
        );
        let error = Hosts::of(&names(&["a", "", "b"]), 0).unwrap_err().to_string();
        assert_eq!(error, "rank 1 cannot name its host");
    }

    /// A rank of a group of threads, on a host of this name.
    struct On<B>(B, &'static str);

    impl<B: Bootstrap> Bootstrap for On<B> {
        fn rank(&self) -> u32 {
            self.0.rank()
        }

        fn world_size(&self) -> u32 {
            self.0.world_size()
        }

        fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BootstrapError> {
            self.0.all_gather(bytes)
        }

        fn host(&self) -> Result<Vec<u8>, BootstrapError> {
            Ok(self.1.into())
        }
    }

    #[test]
    fn the_ranks_of_a_host_gather_and_share_files_among_themselves() {
        let ranks = threads(4, Duration::from_secs(30));
        thread::scope(|scope| {
            for (rank, name) in ranks.into_iter().zip(["a", "b", "b", "a"]) {
                scope.spawn(move || {
                    let rank = On(rank, name);
                    let hosts = Hosts::meet(&rank).unwrap();
                    let within = hosts.within(&rank);
                    let gathered = within.all_gather(&[rank.rank() as u8]).unwrap();
                    let expected = if name == "a" { [vec![0], vec![3]] } else { [vec![1], vec![2]] };
                    assert_eq!(gathered, expected);
                    let folder = tempfile::tempdir().unwrap();
                    let path = folder.path().join("file");
                    std::fs::write(&path, name).unwrap();
                    let own = (within.rank() == 0).then(|| File::open(&path).unwrap());
                    let own = own.as_ref().map(File::as_fd);
                    // Opened for writing as well, which the file's owner may.
                    let mut text = String::new();
                    File::from(within.share_file(own).unwrap()).read_to_string(&mut text).unwrap();
                    assert_eq!(text, name);
                });
            }
        });
    }
}
