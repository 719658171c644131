//! The place that modules of kernels come from.

use std::{
    env, fmt,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use fused_collective_core::kernels::Processor;
use fused_collective_kernels::Archive;

use crate::error::Error;

/// Names a folder of kernels that comes before any [`KernelSource`].
pub const FOLDER_VARIABLE: &str = "FUSED_COLLECTIVE_PTX";
/// The most bytes of a module that is read: twenty times as many as the largest has.
const MAX_MODULE_BYTES: u64 = 64 << 20;

/// The place that modules of kernels come from. The environment variable `FUSED_COLLECTIVE_PTX`, where it is set, names a
/// folder that comes first.
#[non_exhaustive]
#[derive(Clone, Default)]
pub enum KernelSource {
    /// The kernels inside this library.
    #[default]
    Embedded,
    /// An archive in the form of `fused-collective-kernels`.
    Archive(&'static [u8]),
    /// A folder with a folder for each processor, `sm_90` for instance, and in it a file of PTX for each module,
    /// `bf16_w4.ptx`.
    Folder(PathBuf),
    /// The caller's: the bytes of a processor's module, PTX or machine code, by their names; `None` where there is none.
    Bytes(Arc<ModuleBytes>),
}

/// A function that gives the bytes of a module by the names of a processor and of the module.
pub type ModuleBytes = dyn Fn(&str, &str) -> Option<Vec<u8>> + Send + Sync;

impl fmt::Debug for KernelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KernelSource::Embedded => f.write_str("Embedded"),
            KernelSource::Archive(_) => f.write_str("Archive"),
            KernelSource::Folder(folder) => f.debug_tuple("Folder").field(folder).finish(),
            KernelSource::Bytes(_) => f.write_str("Bytes"),
        }
    }
}

impl KernelSource {
    /// This source, or the folder that the environment names.
    pub(super) fn or_of_environment(&self) -> KernelSource {
        env::var_os(FOLDER_VARIABLE)
            .map_or_else(|| self.clone(), |folder| KernelSource::Folder(folder.into()))
    }

    /// Finds the best processor for a GPU of compute capability `capability` that the source has kernels for; `module` is
    /// the name of one that it must have.
    ///
    /// # Errors
    /// There are none: where they were looked for.
    pub(super) fn processor(&self, capability: u32, module: &str) -> Result<Processor, Error> {
        let mut processors = Processor::for_capability(capability);
        if let Some(processor) = processors.find(|processor| self.has(*processor, module)) {
            return Ok(processor);
        }
        let names: Vec<&str> =
            Processor::for_capability(capability).map(|processor| processor.name).collect();
        if names.is_empty() {
            let (major, minor) = (capability / 10, capability % 10);
            return Err(Error::Kernels(format!(
                "there are no kernels for GPUs of compute capability {major}.{minor}: 8.0 is the least"
            )));
        }
        let names = names.join(" or ");
        Err(Error::Kernels(match self {
            KernelSource::Embedded => format!(
                "this library was built without kernels for this GPU ({names}): build them into it, or name a folder \
                 that has them"
            ),
            KernelSource::Folder(folder) => {
                format!("there are no kernels for this GPU ({names}) in {}", folder.display())
            }
            KernelSource::Archive(_) | KernelSource::Bytes(_) => {
                format!("the caller gave no kernels for this GPU ({names})")
            }
        }))
    }

    /// The archive; empty where the source is none.
    fn archive(&self) -> Result<Archive<'static>, fused_collective_kernels::Error> {
        match self {
            KernelSource::Embedded => Archive::embedded(),
            KernelSource::Archive(bytes) => Archive::open(bytes),
            KernelSource::Folder(_) | KernelSource::Bytes(_) => Archive::open(&[]),
        }
    }

    fn has(&self, processor: Processor, module: &str) -> bool {
        match self {
            KernelSource::Embedded | KernelSource::Archive(_) => {
                self.archive().is_ok_and(|archive| archive.module(processor.name, module).is_some())
            }
            KernelSource::Folder(folder) => folder.join(processor.name).is_dir(),
            KernelSource::Bytes(bytes) => bytes(processor.name, module).is_some(),
        }
    }

    /// Loads a module for a GPU of compute capability `capability`: `load` gets one image of it after another, the best first,
    /// until it takes one. They are `processor`'s, and from an archive those of older processors that are launched alike, as a
    /// driver may be too old for the machine code.
    ///
    /// # Errors
    /// The module is missing or cannot be read; the last of `load`'s.
    pub(super) fn load<T>(
        &self,
        processor: Processor,
        capability: u32,
        module: &str,
        mut load: impl FnMut(Vec<u8>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self {
            KernelSource::Embedded | KernelSource::Archive(_) => {
                let unusable =
                    |why: &dyn fmt::Display| Error::Kernels(format!("the archive of kernels: {why}"));
                let archive = self.archive().map_err(|error| unusable(&error))?;
                let alike = |it: &Processor| {
                    it.capability <= processor.capability && it.has_clusters() == processor.has_clusters()
                };
                let mut last = unusable(&format_args!("there is no {module} for {}", processor.name));
                for processor in Processor::for_capability(capability).filter(alike) {
                    let Some(module) = archive.module(processor.name, module) else { continue };
                    for image in
                        [&|| module.machine_code(capability), &|| module.ptx()] as [&dyn Fn() -> _; 2]
                    {
                        let Some(image) = image().map_err(|error| unusable(&error))? else { continue };
                        match load(image) {
                            Ok(loaded) => return Ok(loaded),
                            Err(error) => last = error,
                        }
                    }
                }
                Err(last)
            }
            KernelSource::Folder(folder) => {
                let file = folder.join(processor.name).join(module).with_extension("ptx");
                let unusable =
                    |error: io::Error| Error::Kernels(format!("the kernels in {}: {error}", file.display()));
                load(read(&file).map_err(unusable)?)
            }
            KernelSource::Bytes(bytes) => {
                let none = || Error::Kernels(format!("the caller gave no module {module}"));
                load(bytes(processor.name, module).ok_or_else(none)?)
            }
        }
    }
}

/// The bytes of a file, which may be a device without an end.
fn read(file: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(file)?.take(MAX_MODULE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_MODULE_BYTES {
        let why = format!("it has more than {MAX_MODULE_BYTES} bytes, the most that is read");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use fused_collective_core::launch::LAYOUT;
    use fused_collective_kernels::{Kind, Member, pack};

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn missing_kernels_are_an_error_that_says_where_they_were_looked_for() {
        let root = folder();
        let source = KernelSource::Folder(root.path().to_owned());
        let error = source.processor(90, "bf16_w2").unwrap_err().to_string();
        assert!(
            error.contains("sm_90 or sm_80") && error.contains(&root.path().display().to_string()),
            "{error}"
        );
        let error = source.processor(75, "bf16_w2").unwrap_err().to_string();
        assert!(error.contains("7.5"), "{error}");
        fs::create_dir(root.path().join("sm_80")).unwrap();
        assert_eq!(source.processor(90, "bf16_w2").unwrap().name, "sm_80");
    }

    #[test]
    fn the_callers_bytes_are_asked_for_by_name() {
        let give = |processor: &str, module: &str| (processor == "sm_90").then(|| module.into());
        let source = KernelSource::Bytes(Arc::new(give));
        let processor = source.processor(100, "f16_w2").unwrap();
        assert_eq!(processor.name, "sm_90");
        assert_eq!(source.load(processor, 100, "f16_w2", Ok).unwrap(), b"f16_w2");
        assert!(source.processor(80, "f16_w2").is_err());
    }

    /// LZMA2 that stores its content, of less than 64 KB, as it is.
    fn stored(_: Kind, content: &[u8]) -> Vec<u8> {
        let last = u16::try_from(content.len() - 1).unwrap().to_be_bytes();
        [&[1], &last[..], content, &[0]].concat()
    }

    #[test]
    fn a_driver_is_given_one_image_after_another_until_it_takes_one() {
        let member = |processor: &str, kind| Member {
            processor: processor.to_owned(),
            module: "bf16_w2".to_owned(),
            kind,
            bytes: format!("{kind:?} for {processor}").into_bytes(),
        };
        let all = [
            ("sm_80", Kind::Ptx),
            ("sm_90", Kind::Ptx),
            ("sm_90", Kind::MachineCode),
            ("sm_100a", Kind::MachineCode),
        ];
        let frames = [all.map(|(processor, kind)| member(processor, kind)).to_vec()];
        let source = KernelSource::Archive(pack(LAYOUT, &frames, stored).unwrap().leak());
        let offered = |capability| {
            let processor = source.processor(capability, "bf16_w2").unwrap();
            let mut offered = Vec::new();
            let taken: Result<(), Error> = source.load(processor, capability, "bf16_w2", |image| {
                offered.push(String::from_utf8(image).unwrap());
                Err(Error::Unsupported("this image"))
            });
            assert!(matches!(taken, Err(Error::Unsupported("this image"))));
            offered
        };
        // An `sm_80` kernel would be launched otherwise than the ones before it.
        assert_eq!(offered(100), ["MachineCode for sm_100a", "Ptx for sm_90"]);
        assert_eq!(offered(90), ["MachineCode for sm_90", "Ptx for sm_90"]);
        assert_eq!(offered(103), ["Ptx for sm_90"]);
        assert_eq!(offered(89), ["Ptx for sm_80"]);
        let processor = source.processor(90, "bf16_w2").unwrap();
        assert_eq!(source.load(processor, 90, "bf16_w2", Ok).unwrap(), b"MachineCode for sm_90");
        let missing = source.load(processor, 90, "bf16_w4", Ok).unwrap_err().to_string();
        assert!(missing.ends_with("there is no bf16_w4 for sm_90"), "{missing}");
    }

    #[test]
    fn a_module_without_an_end_is_refused() {
        let root = folder();
        fs::create_dir(root.path().join("sm_90")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", root.path().join("sm_90/bf16_w4.ptx")).unwrap();
        let source = KernelSource::Folder(root.path().to_owned());
        let hopper = Processor::for_capability(90).next().unwrap();
        let error = |module| source.load(hopper, 90, module, Ok).unwrap_err().to_string();
        let endless = error("bf16_w4");
        assert!(endless.contains("bf16_w4.ptx") && endless.contains("more than 67108864 bytes"), "{endless}");
        let missing = error("bf16_w2");
        assert!(missing.contains("bf16_w2.ptx"), "{missing}");
    }
}
