//! `core`'s table of kernels, held against the modules as they were compiled.

use std::{collections::BTreeMap, fs};

use fused_collective_core::kernels::{Bounds, Kernel, Module, Processor, Set, Version, bounds};

use crate::{folder, read};

/// The entry points of a module's PTX, each with its bounds.
fn entries(ptx: &str) -> BTreeMap<&str, Bounds> {
    let mut entries = BTreeMap::new();
    for entry in ptx.split(".visible .entry ").skip(1) {
        let (name, rest) = entry.split_once('(').expect("a parameter");
        let (directives, _) = rest.split_once('{').expect("a body");
        let number = |directive: &str| {
            let (_, rest) = directives.split_once(directive)?;
            rest.split(|c: char| !c.is_ascii_digit()).find(|number| !number.is_empty())?.parse().ok()
        };
        let bound = |directive| number(directive).unwrap_or_else(|| panic!("{name} has no {directive}"));
        let bounds = Bounds { threads: bound(".maxntid"), blocks: bound(".minnctapersm") };
        assert!(entries.insert(name, bounds).is_none(), "{name} twice");
    }
    entries
}

#[test]
fn modules_have_the_entry_points_of_the_table_and_no_others() {
    for processor in Processor::ALL {
        for module in Module::all() {
            let name = format!("{}/{}", processor.name, module.name());
            let ptx = read(&folder().join(format!("{name}.ptx")));
            let mut compiled = entries(&ptx);
            if module.set == Set::Local {
                compiled.retain(|name, _| name.starts_with("local_"));
            }
            let entries_of = |kernel: &'static Kernel| Version::ALL.map(|version| kernel.entry(version));
            let listed: BTreeMap<&str, Bounds> = module
                .set
                .kernels()
                .flat_map(entries_of)
                .map(|entry| (entry, bounds(processor.name, module.dtype, module.set, entry)))
                .collect();
            assert_eq!(compiled, listed, "{name}");
        }
    }
}

#[test]
fn there_are_the_modules_of_the_table_and_no_others() {
    for processor in Processor::ALL {
        let names = fs::read_dir(folder().join(processor.name)).unwrap();
        let mut compiled: Vec<_> =
            names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
        let mut listed: Vec<_> = Module::all().map(|module| format!("{}.ptx", module.name())).collect();
        compiled.sort();
        listed.sort();
        assert_eq!(compiled, listed, "{}", processor.name);
    }
}
