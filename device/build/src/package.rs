//! The package of kernels, as cargo describes it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::{Path, PathBuf},
};

use cargo_metadata::{CrateType, DependencyKind, Metadata, MetadataCommand, Target};

use crate::{Error, TARGET, command::output, toolchain};

/// A package whose static libraries are modules of kernels.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) manifest: PathBuf,
    pub(crate) name: String,
    /// The targets to build, each of which is a module.
    modules: Vec<Target>,
    /// The packages to compile for the processor: this one, and those whose code goes into it. Those with a build script are
    /// not among them, as it would be compiled for the processor as well.
    pub(crate) device: BTreeSet<String>,
    /// The files and folders whose change changes the kernels.
    pub(crate) sources: Vec<PathBuf>,
}

impl Package {
    /// Asks cargo about the package in `folder`.
    ///
    /// # Errors
    /// There is no such package, or it has no static library.
    pub(crate) fn read(folder: &Path) -> Result<Self, Error> {
        let package_error = |problem: String| Error::Package { folder: folder.to_owned(), problem };
        let manifest = folder.join("Cargo.toml");
        let manifest = manifest.canonicalize().map_err(Error::io("read", &manifest))?;
        let mut command = MetadataCommand::new();
        command.cargo_path(toolchain::cargo()).manifest_path(&manifest);
        command.other_options(["--filter-platform".to_owned(), TARGET.to_owned()]);
        let metadata = output(&mut command.cargo_command()).and_then(|text| {
            MetadataCommand::parse(text).map_err(|error| package_error(error.to_string()))
        })?;
        Package::of(&metadata, &manifest).ok_or_else(|| {
            package_error(
                "not a package with a library or an example of crate-type staticlib and without a build script"
                    .to_owned(),
            )
        })
    }

    fn of(metadata: &Metadata, manifest: &Path) -> Option<Self> {
        let packages: HashMap<_, _> =
            metadata.packages.iter().map(|package| (&package.id, package)).collect();
        let package = metadata.packages.iter().find(|package| package.manifest_path == manifest)?;
        let is_module = |target: &&Target| target.crate_types.contains(&CrateType::StaticLib);
        let modules: Vec<Target> = package.targets.iter().filter(is_module).cloned().collect();
        if modules.is_empty() {
            return None;
        }
        let mut device = BTreeSet::new();
        let mut sources = Vec::new();
        let mut seen = HashSet::new();
        let mut waiting = vec![&package.id];
        while let Some(id) = waiting.pop() {
            let package = packages.get(id)?;
            let has = |kind: fn(&Target) -> bool| package.targets.iter().any(kind);
            // Procedural macros, and what they need, run on the host.
            if has(Target::is_proc_macro) || !seen.insert(id) {
                continue;
            }
            if !has(Target::is_custom_build) {
                device.insert(package.name.to_string());
            }
            if package.source.is_none() {
                sources.push(package.manifest_path.clone().into_std_path_buf());
                let files = package.targets.iter().filter(|it| is_module(it) || it.is_lib());
                sources.extend(files.filter_map(|target| Some(target.src_path.parent()?.into())));
            }
            let node = metadata.resolve.as_ref()?.nodes.iter().find(|node| node.id == *id)?;
            let linked = node
                .deps
                .iter()
                .filter(|it| it.dep_kinds.iter().any(|kind| kind.kind == DependencyKind::Normal));
            waiting.extend(linked.map(|dependency| &dependency.pkg));
        }
        sources.sort();
        sources.dedup();
        let (manifest, name) = (manifest.to_owned(), package.name.to_string());
        device.contains(&name).then_some(Package { manifest, name, modules, device, sources })
    }

    /// The modules' names.
    pub(crate) fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().map(|target| &*target.name)
    }

    /// cargo's options that name the targets to build. The library is built for examples as well.
    pub(crate) fn targets<'a>(&'a self) -> Vec<&'a str> {
        let option = |target: &'a Target| {
            if target.is_example() { vec!["--example", &*target.name] } else { vec!["--lib"] }
        };
        self.modules.iter().flat_map(option).collect()
    }
}
