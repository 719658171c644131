//! Writing an archive: the one place that knows its form.
//!
//! An archive is [`MAGIC`], the length of the index in 4 bytes, the index, and frames. A frame is a stream of LZMA2: machine
//! code takes a seventh less than with Zstandard. PTX is in it with its [names](crate::names) encoded. The index is text:
//! ```text
//! fused-collective-kernels 3 CHECKSUM     of the index's other lines
//! layout LAYOUT                           fingerprint of the kernels' launch structs
//! frame LENGTH CHECKSUM                   of the next frame, compressed
//! sm_90 bf16_w2 ptx OFFSET LENGTH         a file in the frame named last: its place in the content
//! sm_90 f16_w2 ptx OFFSET LENGTH
//! frame LENGTH CHECKSUM
//! sm_90 bf16_w2 cubin OFFSET LENGTH
//! ```
//! Checksums are FNV-1a of 64 bits, in hexadecimal digits; all else is decimal.

use std::{borrow::Cow, fmt::Write};

use fused_collective_core::fingerprint::Fingerprint;

use crate::names;

/// The first bytes of an archive.
pub(crate) const MAGIC: [u8; 4] = *b"fck\x03";
/// The dictionary of a frame's LZMA2, in bytes: more than most frames have.
pub const DICTIONARY: u32 = 16 << 20;
/// The beginning of an index: the form's name and version.
pub(crate) const HEADING: &str = "fused-collective-kernels 3 ";

/// The two forms of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// PTX, which the driver compiles.
    Ptx,
    /// Machine code, of one processor.
    MachineCode,
}

impl Kind {
    const NAMES: [(Kind, &str); 2] = [(Kind::Ptx, "ptx"), (Kind::MachineCode, "cubin")];

    fn name(self) -> &'static str {
        Kind::NAMES[self as usize].1
    }

    pub(crate) fn parse(name: &str) -> Option<Kind> {
        Kind::NAMES.into_iter().find_map(|(kind, known)| (known == name).then_some(kind))
    }
}

/// A file to pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The processor, as PTX names it: `sm_90`. Without white space.
    pub processor: String,
    /// The module's name: `bf16_w4`. Without white space.
    pub module: String,
    /// The form.
    pub kind: Kind,
    /// The content.
    pub bytes: Vec<u8>,
}

/// Packs `frames` into an archive, for kernels of this launch `layout`. Files that are alike belong into one frame; to read one
/// of them, the frame is decompressed up to its end. `compress` makes a frame of LZMA2, with a dictionary of [`DICTIONARY`], of
/// bytes whose first file has this kind.
///
/// # Errors
/// The first member that should be PTX, and is none.
pub fn pack(
    layout: u32,
    frames: &[Vec<Member>],
    mut compress: impl FnMut(Kind, &[u8]) -> Vec<u8>,
) -> Result<Vec<u8>, &Member> {
    let mut index = format!("layout {layout}\n");
    let mut packed = Vec::new();
    for members in frames {
        let (mut content, mut lines) = (Vec::new(), String::new());
        for member in members {
            let Member { processor, module, kind, bytes } = member;
            let bytes = match kind {
                Kind::Ptx => Cow::Owned(names::encode(bytes).ok_or(member)?),
                Kind::MachineCode => Cow::Borrowed(bytes),
            };
            let (offset, length) = (content.len(), bytes.len());
            let _ = writeln!(lines, "{processor} {module} {} {offset} {length}", kind.name());
            content.extend(&*bytes);
        }
        let Some(first) = members.first() else { continue };
        let frame = compress(first.kind, &content);
        let _ = writeln!(index, "frame {} {:x}", frame.len(), checksum(&frame));
        index += &lines;
        packed.extend(frame);
    }
    let index = format!("{HEADING}{:x}\n{index}", checksum(index.as_bytes()));
    Ok([&MAGIC, &(index.len() as u32).to_le_bytes(), index.as_bytes(), &packed[..]].concat())
}

pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    Fingerprint::EMPTY.bytes(bytes).value()
}
