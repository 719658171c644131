//! Reading an archive. [`pack`](crate::pack) describes its form.
//!
//! Nothing is decompressed before its checksum was compared: a damaged archive is an error.

use std::{
    fmt,
    io::{self, Read},
    ops::Range,
    str::FromStr,
};

use fused_collective_core::launch::LAYOUT;
use lzma_rust2::Lzma2Reader;

use crate::{
    Kind, names,
    pack::{DICTIONARY, HEADING, MAGIC, checksum},
};

/// The archive of this library; empty in a build without it.
#[cfg(embedded)]
static EMBEDDED: &[u8] = include_bytes!("../archive/kernels.archive");
#[cfg(not(embedded))]
static EMBEDDED: &[u8] = &[];

/// An archive of kernels.
#[derive(Debug)]
pub struct Archive<'a> {
    files: Vec<File<'a>>,
}

/// The PTX or the machine code of a module.
#[derive(Debug)]
struct File<'a> {
    processor: &'a str,
    module: &'a str,
    kind: Kind,
    frame: Frame<'a>,
    /// Its place in the frame's content.
    place: Range<usize>,
}

/// Compressed bytes.
#[derive(Clone, Copy, Debug)]
struct Frame<'a> {
    bytes: &'a [u8],
    checksum: u64,
}

impl Archive<'static> {
    /// The archive that this library carries. It is [empty](Archive::is_empty) in a build without one.
    ///
    /// # Errors
    /// As [`open`](Archive::open).
    pub fn embedded() -> Result<Self, Error> {
        Archive::open(EMBEDDED)
    }
}

impl<'a> Archive<'a> {
    /// The archive whose bytes these are. No bytes are an empty archive.
    ///
    /// # Errors
    /// The archive is damaged, or its kernels take other launch structs than this version of `fused-collective-core` has.
    pub fn open(bytes: &'a [u8]) -> Result<Self, Error> {
        if bytes.is_empty() {
            return Ok(Archive { files: Vec::new() });
        }
        let (index, frames) = split(bytes).ok_or(Error::Damaged("its beginning"))?;
        let (layout, files) = parse(index, frames).ok_or(Error::Damaged("its index"))?;
        if layout != LAYOUT {
            return Err(Error::Layout { found: layout, expected: LAYOUT });
        }
        Ok(Archive { files })
    }

    /// Tells if there are no kernels.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The processors that there are kernels for, as PTX names them (`sm_90`), each once.
    pub fn processors(&self) -> impl Iterator<Item = &'a str> {
        let mut seen = Vec::new();
        self.files.iter().map(|file| file.processor).filter(move |&processor| {
            let new = !seen.contains(&processor);
            if new {
                seen.push(processor);
            }
            new
        })
    }

    /// The module `name` (`bf16_w4`) for `processor` (`sm_90`).
    pub fn module(&self, processor: &str, name: &str) -> Option<Module<'_>> {
        let find = |kind| {
            let is = |it: &&File<'_>| it.kind == kind && it.processor == processor && it.module == name;
            self.files.iter().find(is)
        };
        let module = Module { ptx: find(Kind::Ptx), machine_code: find(Kind::MachineCode) };
        (module.ptx.is_some() || module.machine_code.is_some()).then_some(module)
    }
}

/// A module of kernels in an archive: PTX, machine code or both.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    ptx: Option<&'a File<'a>>,
    machine_code: Option<&'a File<'a>>,
}

impl Module<'_> {
    /// The PTX, which the driver compiles when it loads it, if there is some. The call decompresses it: nothing is kept.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn ptx(&self) -> Result<Option<Vec<u8>>, Error> {
        self.ptx.map(File::read).transpose()
    }

    /// Machine code that runs on GPUs of compute capability `capability` (90 is 9.0), if there is some. The driver loads it
    /// without compiling. One that is older than the release that made it may refuse it, and take the [PTX](Self::ptx).
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn machine_code(&self, capability: u32) -> Result<Option<Vec<u8>>, Error> {
        let file = self.machine_code.filter(|file| runs_on(file.processor, capability));
        file.map(File::read).transpose()
    }
}

/// Tells if machine code for `processor` runs on GPUs of compute capability `capability`: within a major version on the same
/// or a later one, and with an `a` in the name on no other at all.
fn runs_on(processor: &str, capability: u32) -> bool {
    let number = processor.strip_prefix("sm_").unwrap_or_default();
    let (number, exact) = number.strip_suffix('a').map_or((number, false), |number| (number, true));
    number.parse().is_ok_and(|compiled: u32| {
        compiled == capability || (!exact && compiled / 10 == capability / 10 && compiled < capability)
    })
}

impl File<'_> {
    fn read(&self) -> Result<Vec<u8>, Error> {
        let damaged = Error::Damaged("a frame of modules");
        if checksum(self.frame.bytes) != self.frame.checksum {
            return Err(damaged);
        }
        let mut content = Lzma2Reader::new(self.frame.bytes, DICTIONARY, None);
        let Range { start, end } = self.place;
        let mut bytes = Vec::new();
        let skipped = io::copy(&mut content.by_ref().take(start as u64), &mut io::sink());
        let read = content.take((end - start) as u64).read_to_end(&mut bytes);
        match (skipped, read) {
            (Ok(skipped), Ok(read)) if skipped == start as u64 && read == end - start => match self.kind {
                Kind::Ptx => names::decode(&bytes).ok_or(damaged),
                Kind::MachineCode => Ok(bytes),
            },
            _ => Err(damaged),
        }
    }
}

/// The index, and the frames behind it.
fn split(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (length, rest) = bytes.strip_prefix(&MAGIC)?.split_first_chunk()?;
    let (index, frames) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    let (heading, index) = std::str::from_utf8(index).ok()?.split_once('\n')?;
    let expected = u64::from_str_radix(heading.strip_prefix(HEADING)?, 16).ok()?;
    (checksum(index.as_bytes()) == expected).then_some((index, frames))
}

/// The launch layout and the files that an index names.
fn parse<'a>(index: &'a str, mut frames: &'a [u8]) -> Option<(u32, Vec<File<'a>>)> {
    fn number<'a, T: FromStr>(words: &mut impl Iterator<Item = &'a str>) -> Option<T> {
        words.next()?.parse().ok()
    }
    let mut lines = index.lines();
    let layout = lines.next()?.strip_prefix("layout ")?.parse().ok()?;
    let (mut files, mut frame) = (Vec::new(), None);
    for line in lines {
        let mut words = line.split(' ');
        let first = words.next()?;
        if first == "frame" {
            let (bytes, rest) = frames.split_at_checked(number(&mut words)?)?;
            frames = rest;
            frame = Some(Frame { bytes, checksum: u64::from_str_radix(words.next()?, 16).ok()? });
        } else {
            let module = words.next()?;
            let kind = Kind::parse(words.next()?)?;
            let start: usize = number(&mut words)?;
            let place = start..start.checked_add(number(&mut words)?)?;
            files.push(File { processor: first, module, kind, frame: frame?, place });
        }
    }
    frames.is_empty().then_some((layout, files))
}

/// A reason for an archive to be of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A part of the archive is not as it was written.
    Damaged(&'static str),
    /// The kernels take other launch structs.
    Layout {
        /// The fingerprint of the kernels' launch structs.
        found: u32,
        /// [`LAYOUT`] of the `fused-collective-core` that this was built with.
        expected: u32,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Damaged(part) => write!(f, "the archive of kernels is damaged: {part}"),
            Error::Layout { found, expected } => write!(
                f,
                "the archive of kernels is of another version: its launch layout is {found:#010x}, not {expected:#010x}"
            ),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use lzma_rust2::{Lzma2Options, Lzma2Writer};

    use super::*;
    use crate::{Member, pack};

    fn member(processor: &str, module: &str, kind: Kind, text: &str) -> Member {
        let (processor, module) = (processor.to_owned(), module.to_owned());
        Member { processor, module, kind, bytes: text.repeat(100).into_bytes() }
    }

    /// Three frames: the second one has no machine code, and a module that is empty; the third one has no PTX.
    fn packed(layout: u32) -> Vec<u8> {
        let frames = [
            vec![
                member("sm_90", "bf16_w2", Kind::Ptx, ".version 8.6\n"),
                member("sm_90", "f32_w2", Kind::Ptx, ".version 8.6 f32\n"),
                member("sm_90", "bf16_w2", Kind::MachineCode, "\u{7f}ELF"),
            ],
            vec![member("sm_100a", "bf16_w2", Kind::Ptx, "b"), member("sm_100a", "f32_w2", Kind::Ptx, "")],
            vec![member("sm_120a", "bf16_w2", Kind::MachineCode, "m")],
        ];
        let packed = pack(layout, &frames, |_, content| {
            let mut options = Lzma2Options::with_preset(0);
            options.lzma_options.dict_size = DICTIONARY;
            let mut writer = Lzma2Writer::new(Vec::new(), options);
            writer.write_all(content).unwrap();
            writer.finish().unwrap()
        });
        packed.unwrap()
    }

    #[test]
    fn a_member_that_is_no_ptx_is_not_packed() {
        let [good, wrong] = ["%r1", "%r!"].map(|text| member("sm_90", "bf16_w2", Kind::Ptx, text));
        let frames = [vec![good], vec![wrong]];
        assert_eq!(pack(LAYOUT, &frames, |_, content| content.to_vec()), Err(&frames[1][0]));
    }

    #[test]
    fn every_file_of_an_archive_is_read_as_it_was_packed() {
        let bytes = packed(LAYOUT);
        let archive = Archive::open(&bytes).unwrap();
        assert_eq!(archive.processors().collect::<Vec<_>>(), ["sm_90", "sm_100a", "sm_120a"]);
        let module = archive.module("sm_90", "bf16_w2").unwrap();
        assert_eq!(module.ptx().unwrap().unwrap(), ".version 8.6\n".repeat(100).into_bytes());
        assert_eq!(module.machine_code(90).unwrap().unwrap(), "\u{7f}ELF".repeat(100).into_bytes());
        assert_eq!(module.machine_code(100), Ok(None));
        let module = archive.module("sm_90", "f32_w2").unwrap();
        assert_eq!(module.ptx().unwrap().unwrap(), ".version 8.6 f32\n".repeat(100).into_bytes());
        assert_eq!(module.machine_code(90), Ok(None));
        assert_eq!(archive.module("sm_100a", "bf16_w2").unwrap().ptx(), Ok(Some(vec![b'b'; 100])));
        assert_eq!(archive.module("sm_100a", "f32_w2").unwrap().ptx(), Ok(Some(Vec::new())));
        let module = archive.module("sm_120a", "bf16_w2").unwrap();
        assert_eq!((module.ptx(), module.machine_code(120)), (Ok(None), Ok(Some(vec![b'm'; 100]))));
        assert!(archive.module("sm_80", "bf16_w2").is_none() && archive.module("sm_90", "f16_w2").is_none());
    }

    #[test]
    fn a_library_without_an_archive_has_no_kernels() {
        let empty = Archive::open(&[]).unwrap();
        assert!(empty.is_empty() && empty.processors().next().is_none());
        assert!(empty.module("sm_90", "bf16_w2").is_none());
        assert_eq!(Archive::embedded().unwrap().is_empty(), cfg!(not(embedded)));
    }

    #[test]
    fn damage_anywhere_is_an_error() {
        let whole = packed(LAYOUT);
        let read_all = |bytes: &[u8]| {
            let archive = Archive::open(bytes)?;
            for processor in archive.processors() {
                for name in ["bf16_w2", "f32_w2"] {
                    let Some(module) = archive.module(processor, name) else {
                        assert_eq!([processor, name], ["sm_120a", "f32_w2"]);
                        continue;
                    };
                    module.ptx()?;
                    module.machine_code(90)?;
                    module.machine_code(120)?;
                }
            }
            Ok(())
        };
        assert_eq!(read_all(&whole), Ok(()));
        for length in 1..whole.len() {
            assert!(matches!(read_all(&whole[..length]), Err(Error::Damaged(_))), "{length} bytes");
        }
        for place in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[place] ^= 0x10;
            assert!(matches!(read_all(&damaged), Err(Error::Damaged(_))), "byte {place}");
        }
        assert!(read_all(&[&whole[..], b"more"].concat()).is_err());
    }

    #[test]
    fn kernels_of_another_launch_layout_are_refused() {
        let error = Archive::open(&packed(LAYOUT ^ 1)).unwrap_err();
        assert_eq!(error, Error::Layout { found: LAYOUT ^ 1, expected: LAYOUT });
        assert!(error.to_string().contains(&format!("not {LAYOUT:#010x}")), "{error}");
    }

    #[test]
    fn machine_code_runs_where_nvidia_says_so() {
        let on = |processor| [80, 86, 90, 100, 103, 120].map(|capability| runs_on(processor, capability));
        assert_eq!(on("sm_80"), [true, true, false, false, false, false]);
        assert_eq!(on("sm_90"), [false, false, true, false, false, false]);
        assert_eq!(on("sm_100a"), [false, false, false, true, false, false]);
        assert_eq!(on("sm_120a"), [false, false, false, false, false, true]);
        assert!(!runs_on("sm_86", 80) && !runs_on("gfx90a", 90));
    }
}
