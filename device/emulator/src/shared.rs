//! A block's shared memory, with who has written and read each word, and the counters in it.

use std::collections::HashMap;

/// Where in its thread's life an access to memory was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    /// The thread of the block.
    pub(crate) thread: u32,
    /// Barriers of the block that it had passed.
    pub(crate) barriers: u64,
    /// Barriers of its whole warp that it had passed.
    pub(crate) meetings: u64,
}

impl Access {
    /// Whether something orders this access before `later`, of the same block.
    pub(crate) fn is_before(self, later: Access) -> bool {
        self.thread == later.thread
            || later.barriers > self.barriers
            || self.thread / 32 == later.thread / 32 && later.meetings > self.meetings
    }
}

/// Who wrote a word.
#[derive(Clone, Copy)]
enum Writer {
    Thread(Access),
    /// A block of the cluster, and the phase of the counter at an address that says so when it ends.
    Sent {
        counter: u32,
        phase: u64,
    },
}

#[derive(Clone, Default)]
struct Word {
    value: u32,
    writer: Option<Writer>,
    /// Reads since it was written.
    readers: Vec<Access>,
}

/// An `mbarrier`.
#[derive(Debug)]
pub(crate) struct Counter {
    /// Arrivals of a phase.
    count: u32,
    arrivals_left: u32,
    /// Bytes that are expected, less those that came.
    bytes_left: i64,
    /// Phases that have ended.
    pub(crate) phase: u64,
}

impl Counter {
    fn advance(&mut self) {
        if self.arrivals_left == 0 && self.bytes_left == 0 {
            self.phase += 1;
            self.arrivals_left = self.count;
        }
    }
}

fn not_waited_for(address: u64) -> String {
    format!("address {address} of shared memory was sent, and this thread has not waited for its counter")
}

pub(crate) struct Shared {
    words: Vec<Word>,
    counters: HashMap<u32, Counter>,
}

impl Shared {
    pub(crate) fn new(bytes: u32) -> Shared {
        Shared { words: vec![Word::default(); bytes.div_ceil(4) as usize], counters: HashMap::new() }
    }

    /// The word at `address`, where values may be.
    fn word(&mut self, address: u64) -> Result<&mut Word, String> {
        if !address.is_multiple_of(4) {
            return Err(format!("address {address} of shared memory is not aligned"));
        }
        if self
            .counters
            .keys()
            .any(|counter| (u64::from(*counter)..u64::from(*counter) + 8).contains(&address))
        {
            return Err(format!("address {address} of shared memory is a counter's"));
        }
        let bytes = self.words.len() * 4;
        let word = usize::try_from(address / 4).ok().and_then(|index| self.words.get_mut(index));
        word.ok_or_else(|| format!("address {address} is outside {bytes} bytes of shared memory"))
    }

    /// What a thread reads. `observed` is how many phases of a counter it knows to have ended.
    pub(crate) fn load(
        &mut self,
        address: u64,
        access: Access,
        observed: impl Fn(u32) -> u64,
    ) -> Result<u32, String> {
        let word = self.word(address)?;
        match word.writer {
            None => return Err(format!("nobody has written address {address} of shared memory")),
            Some(Writer::Thread(writer)) if !writer.is_before(access) => {
                let writer = writer.thread;
                return Err(format!(
                    "nothing orders thread {writer}'s store to address {address} of shared memory before this load"
                ));
            }
            Some(Writer::Sent { counter, phase }) if observed(counter) <= phase => {
                return Err(not_waited_for(address));
            }
            _ => {}
        }
        word.readers.retain(|reader| !reader.is_before(access));
        word.readers.push(access);
        Ok(word.value)
    }

    /// What a thread writes. `observed` as in [`load`](Self::load).
    pub(crate) fn store(
        &mut self,
        address: u64,
        value: u32,
        access: Access,
        observed: impl Fn(u32) -> u64,
    ) -> Result<(), String> {
        let word = self.word(address)?;
        if let Some(Writer::Sent { counter, phase }) = word.writer
            && observed(counter) <= phase
        {
            return Err(not_waited_for(address));
        }
        if let Some(Writer::Thread(writer)) = word.writer
            && !writer.is_before(access)
        {
            let writer = writer.thread;
            return Err(format!(
                "nothing orders thread {writer}'s store to address {address} of shared memory before this one"
            ));
        }
        if let Some(reader) = word.readers.iter().find(|reader| !reader.is_before(access)) {
            let reader = reader.thread;
            return Err(format!(
                "nothing orders thread {reader}'s load of address {address} of shared memory before this store"
            ));
        }
        *word = Word { value, writer: Some(Writer::Thread(access)), readers: Vec::new() };
        Ok(())
    }

    pub(crate) fn initialize_counter(&mut self, address: u64, count: u32) -> Result<(), String> {
        let inside = address.is_multiple_of(8) && address + 8 <= self.words.len() as u64 * 4;
        let counter = Counter { count, arrivals_left: count, bytes_left: 0, phase: 0 };
        if !inside || self.counters.insert(address as u32, counter).is_some() {
            return Err(format!("address {address} of shared memory is no place for a counter, or is one"));
        }
        Ok(())
    }

    pub(crate) fn counter(&mut self, address: u64) -> Result<&mut Counter, String> {
        let counter = u32::try_from(address).ok().and_then(|address| self.counters.get_mut(&address));
        counter.ok_or_else(|| format!("there is no counter at address {address} of shared memory"))
    }

    /// A thread arrives and expects `bytes` bytes.
    pub(crate) fn expect(&mut self, address: u64, bytes: u32) -> Result<(), String> {
        let counter = self.counter(address)?;
        if counter.arrivals_left == 0 {
            return Err(format!(
                "more threads arrive at the counter at address {address} than it has places for"
            ));
        }
        counter.arrivals_left -= 1;
        counter.bytes_left += i64::from(bytes);
        counter.advance();
        Ok(())
    }

    /// A word from a block of the cluster arrives.
    pub(crate) fn receive(&mut self, address: u64, value: u32, counter_address: u64) -> Result<(), String> {
        let phase = self.counter(counter_address)?.phase;
        let writer = Writer::Sent { counter: counter_address as u32, phase };
        *self.word(address)? = Word { value, writer: Some(writer), readers: Vec::new() };
        let counter = self.counter(counter_address)?;
        counter.bytes_left -= 4;
        counter.advance();
        Ok(())
    }
}
