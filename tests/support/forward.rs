//! Backends of tests that hand most methods on to a real one.

/// Implements the named methods of `Collective` by calling a field's: `forward!(engine: prepare write read)`. It stands in the
/// `impl`, with the trait's types in scope.
#[macro_export]
macro_rules! forward {
    ($to:ident: $($method:ident)+) => { $($crate::forward!(@ $method $to);)+ };
    (@ select $to:ident) => { $crate::forward!(@mut $to select(slot: usize) -> Result<(), Error>); };
    (@ prepare $to:ident) => { $crate::forward!(@mut $to prepare(problem: &Problem) -> Result<(), Error>); };
    (@ write $to:ident) => {
        $crate::forward!(@mut $to write(tensor: Tensor, offset: u64, bytes: &[u8]) -> Result<(), Error>);
    };
    (@ fill $to:ident) => { $crate::forward!(@mut $to fill(tensor: Tensor, byte: u8) -> Result<(), Error>); };
    (@ digest $to:ident) => { $crate::forward!(@mut $to digest(tensor: Tensor) -> Result<u64, Error>); };
    (@ read $to:ident) => { $crate::forward!(@mut $to read(tensor: Tensor) -> Result<Vec<u8>, Error>); };
    (@ run $to:ident) => { $crate::forward!(@mut $to run(steps: &[Step]) -> Result<(), Error>); };
    (@ time $to:ident) => {
        $crate::forward!(@mut $to time(steps: &[Step], operations: u32) -> Result<f64, Error>);
    };
    (@ copy_time $to:ident) => { $crate::forward!(@mut $to copy_time(bytes: u64) -> Result<f64, Error>); };
    (@ find_stray_write $to:ident) => {
        $crate::forward!(@mut $to find_stray_write(thorough: bool) -> Result<Option<String>, Error>);
    };
    (@ set_cold $to:ident) => { $crate::forward!(@mut $to set_cold(cold: bool) -> ()); };
    (@ limits $to:ident) => {
        fn limits(&self) -> &Limits {
            self.$to.limits()
        }
    };
    (@ cache_bytes $to:ident) => {
        fn cache_bytes(&self) -> u64 {
            self.$to.cache_bytes()
        }
    };
    (@mut $to:ident $method:ident($($argument:ident: $type:ty),*) -> $result:ty) => {
        fn $method(&mut self, $($argument: $type),*) -> $result {
            self.$to.$method($($argument),*)
        }
    };
}
