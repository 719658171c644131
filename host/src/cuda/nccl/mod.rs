//! NCCL, which carries partial sums between hosts: loaded when it is first needed, and its communicators.
//!
//! NCCL waits for other ranks without a bound, on the device and on the host. What is bounded here:
//! - to connect, by a limit of the caller's: a [`Comm`] that does not block is asked again and again whether it is made;
//! - to enqueue, in the same way;
//! - on the device, by [`Comm::leave`] with `abort` from another thread, which ends what is running.
//!
//! Within a rank one thread at a time is inside of NCCL, whichever it is: [`Comm`] has a lock. NCCL's environment variables
//! are the user's: nothing here sets or reads one but [`LIBRARY_VARIABLE`].
//!
//! A communicator that does not block starts a thread in NCCL for each call that is not captured into a graph.

mod comm;
#[cfg(test)]
pub(in crate::cuda) mod fake;
mod library;

pub use comm::{ABORT_LIMIT, Bounds, Comm, LEAVE_LIMIT, Seat};
pub use library::{Library, MIN_VERSION, UniqueId};
pub use nccl_sys::LIBRARY_VARIABLE;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_that_is_too_old_is_refused_by_its_version() {
        let old = Library::of(fake::nccl::<21_805>()).unwrap_err();
        assert_eq!(old.to_string(), "NCCL 2.18.5 is too old: use 2.19.0 or later");
        assert_eq!(Library::of(fake::nccl::<22_809>()).unwrap().version(), "2.28.9");
    }

    #[test]
    fn releases_whose_symmetric_kernels_do_not_wait_are_known() {
        let waits = |nccl| Library::of(nccl).unwrap().symmetric_kernels_wait();
        assert!(waits(fake::nccl::<22_707>()) && waits(fake::nccl::<23_007>()));
        assert!(!waits(fake::nccl::<22_800>()) && !waits(fake::nccl::<23_004>()));
    }

    #[test]
    fn a_name_arrives_as_it_was_made_and_no_other_length_does() {
        let id = Library::of(fake::nccl::<21_900>()).unwrap().unique_id().unwrap();
        let told = UniqueId::from_bytes(&id.to_bytes()).unwrap();
        assert_eq!(told.to_bytes(), id.to_bytes());
        let error = UniqueId::from_bytes(&[0; 7]).unwrap_err().to_string();
        assert_eq!(error, "NCCL has a name of 7 bytes for the group, not of 128");
    }

    #[test]
    fn an_error_has_nccls_words() {
        let library = Library::of(fake::nccl::<21_900>()).unwrap();
        let error = library.check("connect the group", 3).unwrap_err().to_string();
        assert_eq!(error, "NCCL could not connect the group: fake error 3");
    }
}
