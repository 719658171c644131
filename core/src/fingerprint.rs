//! Fingerprints of the structs that kernels are launched with.
//!
//! A program finds its kernels in files, and the files may be of another version. So every PTX module carries the
//! fingerprints of the structs that its kernels take, each in a variable, and whoever loads it compares them first:
//! [`in_ptx`]. They follow from the structs themselves, by [`fingerprint!`](crate::fingerprint!).

/// A hash in the making: FNV-1a (Fowler, Noll and Vo), 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(u64);

impl Fingerprint {
    /// The hash of nothing.
    pub const EMPTY: Fingerprint = Fingerprint(0xcbf2_9ce4_8422_2325);

    /// Adds bytes.
    pub const fn bytes(self, bytes: &[u8]) -> Fingerprint {
        let mut hash = self.0;
        let mut index = 0;
        while index < bytes.len() {
            hash = (hash ^ bytes[index] as u64).wrapping_mul(0x0100_0000_01b3);
            index += 1;
        }
        Fingerprint(hash)
    }

    /// Adds a text.
    pub const fn text(self, text: &str) -> Fingerprint {
        self.bytes(text.as_bytes())
    }

    /// Adds a number.
    pub const fn number(self, number: u64) -> Fingerprint {
        self.bytes(&number.to_le_bytes())
    }

    /// Adds the size of a field of `S`.
    #[doc(hidden)]
    pub const fn field<S, F>(self, _: fn(&S) -> &F) -> Fingerprint {
        self.number(size_of::<F>() as u64)
    }

    /// The hash, whole.
    pub const fn value(self) -> u64 {
        self.0
    }

    /// The hash in 31 bits. Below 2^31, so that whatever takes it for signed writes it the same.
    pub const fn finish(self) -> u32 {
        ((self.0 ^ self.0 >> 32) & 0x7fff_ffff) as u32
    }
}

/// The fingerprint of `repr(C)` structs: of the names, offsets and sizes of all their fields, after the numbers in
/// brackets, which stand for what structs do not show. A `u32` constant.
///
/// A struct with a field that is not listed does not compile.
/// ```
/// #[repr(C)]
/// struct Pair {
///     first: u32,
///     second: u32,
/// }
/// const LAYOUT: u32 = fused_collective_core::fingerprint! { [1] Pair { first, second } };
/// assert_ne!(LAYOUT, fused_collective_core::fingerprint! { [2] Pair { first, second } });
/// ```
#[macro_export]
macro_rules! fingerprint {
    ([$($number:expr),*] $($name:ident { $($field:ident),* })*) => {{
        let hash = $crate::fingerprint::Fingerprint::EMPTY;
        $(let hash = hash.number($number as u64);)*
        $(
            let hash = hash.text(stringify!($name)).number(::core::mem::size_of::<$name>() as u64);
            $(
                let hash = hash.text(stringify!($field)).number(::core::mem::offset_of!($name, $field) as u64);
                let hash = hash.field(|whole: &$name| &whole.$field);
            )*
            let _ = |$name { $($field: _),* }: $name| ();
        )*
        hash.finish()
    }};
}

/// The fingerprint in variable `symbol` of a module, from its PTX; `None` if the text has none.
///
/// rustc writes the variable as its bytes, `.b8 symbol[4] = {1, 2, 3, 4};`, without zeros at the end; other compilers may write one number.
pub fn in_ptx(ptx: &str, symbol: &str) -> Option<u32> {
    ptx.lines().find_map(|line| {
        let (declared, value) = line.split_once('=')?;
        let name = declared.split_whitespace().next_back()?;
        let value = value.trim().trim_end_matches(';').trim_end();
        if name == symbol {
            return value.parse().ok();
        }
        if name.strip_suffix("[4]")? != symbol {
            return None;
        }
        // Zeros at the end need not be listed, and rustc lists none.
        let mut bytes = [0; 4];
        let mut places = bytes.iter_mut();
        for byte in value.strip_prefix('{')?.strip_suffix('}')?.split(',') {
            *places.next()? = byte.trim().parse().ok()?;
        }
        Some(u32::from_le_bytes(bytes))
    })
}

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;

    #[test]
    fn a_fingerprint_is_read_from_ptx_however_it_is_written() {
        let of = |line: &str| {
            in_ptx(&format!(".version 8.6\n.target sm_90\n{line}\n.visible .entry sum()\n{{\n}}\n"), "layout")
        };
        let rustc = ".visible .global .align 4 .b8 layout[4] = {29, 192, 58, 67};";
        assert_eq!(of(rustc), Some(u32::from_le_bytes([29, 192, 58, 67])));
        assert_eq!(of(".visible .global .align 4 .u32 layout = 123456789;"), Some(123_456_789));
        assert_eq!(of(".global .u32 layout=7 ;"), Some(7));
        assert_eq!(of(".global .align 4 .b8 layout[4] = {7};"), Some(7));
        assert_eq!(of(".global .align 4 .b8 layout[4] = {29, 192, 58};"), Some(0x3a_c01d));
        assert_eq!(of(&format!(".global .u32 other = 8;\n{rustc}")), of(rustc));
    }

    #[test]
    fn a_module_without_a_fingerprint_has_none() {
        for line in ["", "// layout", ".global .u32 other_layout = 7;", ".global .u32 layout_of = 7;"] {
            assert_eq!(in_ptx(line, "layout"), None, "{line}");
        }
        for value in ["1, 2", "{}", "{1, 2, 3, 4, 5}", "{1, 2, 3, 256}"] {
            assert_eq!(in_ptx(&format!(".global .b8 layout[4] = {value};"), "layout"), None, "{value}");
        }
    }

    #[test]
    fn names_offsets_sizes_and_numbers_all_count() {
        #[repr(C)]
        struct Pair {
            first: u32,
            second: u32,
        }
        let hash = crate::fingerprint! { [3] Pair { first, second } };
        let with = |start: u64, fields: [(&str, u64, u64); 2], size| {
            let start = Fingerprint::EMPTY.number(start).text("Pair").number(size);
            let add = |hash: Fingerprint, &(name, offset, size): &(&str, u64, u64)| {
                hash.text(name).number(offset).number(size)
            };
            fields.iter().fold(start, add).finish()
        };
        assert_eq!(hash, with(3, [("first", 0, 4), ("second", 4, 4)], 8));
        for other in [
            with(4, [("first", 0, 4), ("second", 4, 4)], 8),
            with(3, [("second", 0, 4), ("first", 4, 4)], 8),
            with(3, [("first", 0, 4), ("second", 8, 4)], 8),
            with(3, [("first", 0, 4), ("second", 4, 2)], 8),
            with(3, [("first", 0, 4), ("second", 4, 4)], 64),
        ] {
            assert_ne!(hash, other);
        }
    }
}
