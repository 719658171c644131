//! A connection to one rank: whole messages in and out of a socket that never blocks.
//!
//! Whoever owns a channel polls its descriptor and calls [`fill`](Channel::fill) and
//! [`flush`](Channel::flush); a peer that neither reads nor writes costs its own messages and nothing else.

use std::{
    collections::VecDeque,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, Shutdown, recvmsg, send, sendmsg, shutdown,
    },
};

use super::{
    error::Error,
    frame::{Frame, FrameError},
    secret::{Seal, TAG_BYTES},
};

/// Bytes taken from the socket by one [`fill`](Channel::fill).
const READ_BYTES: usize = 64 << 10;

/// See the [module](self).
pub(super) struct Channel {
    socket: OwnedFd,
    /// Received and not yet parsed.
    inbox: Vec<u8>,
    /// The file descriptor that came last and was not taken. More than one is never on its way in a group,
    /// so a peer that sends many cannot exhaust this process's table.
    descriptor: Option<OwnedFd>,
    outbox: VecDeque<Message>,
    /// The most bytes of a payload that are taken.
    limit: usize,
    /// Between hosts: what every message carries a tag of, once both sides have proven that they have the secret.
    seal: Option<Seal>,
    /// True if the connection ended because nothing was heard from the other host.
    silent: bool,
}

/// An encoded message that is being sent.
struct Message {
    bytes: Arc<[u8]>,
    sent: usize,
    /// Travels with the first byte.
    descriptor: Option<Arc<OwnedFd>>,
}

impl Channel {
    /// Over a connected stream socket in non-blocking mode.
    pub(super) fn new(socket: OwnedFd, limit: usize) -> Self {
        Channel {
            socket,
            inbox: Vec::new(),
            descriptor: None,
            outbox: VecDeque::new(),
            limit,
            seal: None,
            silent: false,
        }
    }

    /// Seals all messages from here on, and expects the other side to do so.
    pub(super) fn seal(&mut self, seal: Seal) {
        self.seal = Some(seal);
    }

    /// Takes payloads of up to `limit` bytes from here on.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Queues a message; [`flush`](Self::flush) sends it.
    pub(super) fn queue(&mut self, frame: &Frame) {
        self.queue_encoded(frame.encode().into(), None);
    }

    /// Queues an encoded message, and a file descriptor to go with it.
    pub(super) fn queue_encoded(&mut self, bytes: Arc<[u8]>, descriptor: Option<Arc<OwnedFd>>) {
        let tag = self.seal.as_mut().map(|seal| seal.next_sent(&bytes));
        self.outbox.push_back(Message { bytes, sent: 0, descriptor });
        if let Some(tag) = tag {
            self.outbox.push_back(Message { bytes: Arc::new(tag), sent: 0, descriptor: None });
        }
    }

    /// Sends what the socket takes. A failure is no error here: it ends the connection, and reading tells both
    /// sides so, after all that the peer had still to say.
    pub(super) fn flush(&mut self) {
        while let Some(message) = self.outbox.front_mut() {
            match message.send(self.socket.as_fd()) {
                Ok(sent) => {
                    message.sent += sent;
                    message.descriptor = None;
                    if message.sent == message.bytes.len() {
                        self.outbox.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.outbox.clear();
                    // Fails only on a socket that is not connected any more.
                    let _ = shutdown(&self.socket, Shutdown::Write);
                }
            }
        }
    }

    /// True once everything queued was handed to the kernel, which delivers it even if this process ends.
    pub(super) fn is_flushed(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Reads what is there, at most [`READ_BYTES`]. Returns whether the peer is still connected.
    pub(super) fn fill(&mut self) -> bool {
        let start = self.inbox.len();
        self.inbox.resize(start + READ_BYTES, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut buffer = [IoSliceMut::new(&mut self.inbox[start..])];
            match recvmsg(&self.socket, &mut buffer, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                other => break other.map(|message| message.bytes),
            }
        };
        self.inbox.truncate(start + received.unwrap_or(0));
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptor = descriptors.last();
            }
        }
        self.silent |= matches!(
            received,
            Err(Errno::TIMEDOUT | Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::NETDOWN)
        );
        !matches!(received, Ok(0)) && !matches!(received, Err(error) if error != Errno::AGAIN)
    }

    /// True if the connection ended because nothing was heard from the other host.
    pub(super) fn is_silent(&self) -> bool {
        self.silent
    }

    /// The next whole message that has arrived.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(seal) = &mut self.seal else {
            let Some((frame, length)) = Frame::parse(&self.inbox, self.limit)? else { return Ok(None) };
            self.inbox.drain(..length);
            return Ok(Some(frame));
        };
        // The tag first: nothing of a message is heeded that may be anybody's, but for its length.
        let Some(length) = Frame::length(&self.inbox, self.limit)? else { return Ok(None) };
        let Some((message, rest)) = self.inbox.split_at_checked(length) else { return Ok(None) };
        let Some(tag) = rest.first_chunk::<TAG_BYTES>() else { return Ok(None) };
        if !seal.is_next_received(message, tag) {
            return Err(FrameError::Seal);
        }
        let frame = Frame::parse(message, self.limit)?.map(|(frame, _)| frame);
        self.inbox.drain(..length + TAG_BYTES);
        Ok(frame)
    }

    /// Takes the file descriptor that came with the last message.
    pub(super) fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptor.take()
    }

    /// The events to poll for: anything to read, and room to write if something waits for it.
    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        let flags = if self.is_flushed() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        PollFd::new(&self.socket, flags)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Message {
    fn send(&self, socket: BorrowedFd<'_>) -> rustix::io::Result<usize> {
        let rest = &self.bytes[self.sent..];
        let Some(descriptor) = &self.descriptor else { return send(socket, rest, SendFlags::NOSIGNAL) };
        let descriptors = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fits = control.push(SendAncillaryMessage::ScmRights(&descriptors));
        debug_assert!(fits, "the space was made for one descriptor");
        sendmsg(socket, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL)
    }
}

/// Sleeps until something is there to do, or until `end`.
pub(super) fn wait_for(fds: &mut [PollFd<'_>], end: Option<Instant>) -> Result<(), Error> {
    let left = end.map(|end| end.saturating_duration_since(Instant::now()));
    // A time too long to be told to the kernel is as good as none.
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(Error::system("wait for other ranks")(error)),
    }
}
