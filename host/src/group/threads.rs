//! The bootstrap of ranks that are threads of one process: channels, and no socket.

use std::{
    fmt,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use super::bootstrap::{Bootstrap, BootstrapError};

/// Makes the ranks of a group of `world_size` threads, each to be moved into its thread. No rank waits for the others
/// for longer than `deadline`.
///
/// ```
/// use std::{thread, time::Duration};
/// use fused_collective::group::{Bootstrap as _, threads};
///
/// let ranks = threads(3, Duration::from_secs(10));
/// let gathered = thread::scope(|scope| {
///     let threads: Vec<_> = ranks.into_iter()
///         .map(|rank| scope.spawn(move || rank.all_gather(&[10 + rank.rank() as u8]).unwrap()))
///         .collect();
///     threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
/// });
/// assert_eq!(gathered, vec![vec![vec![10], vec![11], vec![12]]; 3]);
/// ```
pub fn threads(world_size: u32, deadline: Duration) -> Vec<Thread> {
    let mut channels: Vec<Channels> = (0..world_size).map(|_| Channels::default()).collect();
    for receiver in 0..channels.len() {
        for sender in 0..channels.len() {
            let (to, from) = channel();
            channels[sender].to.push(to);
            channels[receiver].from.push(from);
        }
    }
    let rank = |(rank, channels)| Thread { rank, deadline, channels: Mutex::new(channels) };
    (0..).zip(channels).map(rank).collect()
}

/// A rank of a group of threads: see [`threads`].
#[derive(Debug)]
pub struct Thread {
    rank: u32,
    deadline: Duration,
    /// The lock keeps operations one after the other.
    channels: Mutex<Channels>,
}

/// A rank's channels, by rank.
#[derive(Debug, Default)]
struct Channels {
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Receiver<Vec<u8>>>,
}

/// A rank that did not come to an operation.
#[derive(Debug)]
struct Missing {
    rank: usize,
    /// `None`: its thread has ended.
    waited: Option<Duration>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.waited {
            Some(waited) => write!(f, "rank {} did not come within {waited:.1?}", self.rank),
            None => write!(f, "rank {} has left the group", self.rank),
        }
    }
}

impl std::error::Error for Missing {}

impl Bootstrap for Thread {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner).to.len() as u32
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BootstrapError> {
        let Channels { to, from } = &*self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        for (rank, sender) in to.iter().enumerate() {
            sender.send(bytes.to_vec()).map_err(|_| Missing { rank, waited: None })?;
        }
        let receive = |(rank, receiver): (usize, &Receiver<Vec<u8>>)| {
            receiver.recv_timeout(self.deadline).map_err(|error| {
                let waited = (error == RecvTimeoutError::Timeout).then_some(self.deadline);
                BootstrapError::from(Missing { rank, waited })
            })
        };
        from.iter().enumerate().map(receive).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_does_not_come_is_named() {
        let mut ranks = threads(2, Duration::from_millis(50));
        let late = ranks.pop().unwrap();
        let error = ranks[0].barrier().unwrap_err().to_string();
        assert_eq!(error, "rank 1 did not come within 50.0ms");
        drop(late);
        let error = ranks[0].barrier().unwrap_err().to_string();
        assert_eq!(error, "rank 1 has left the group");
    }
}
