//! `core`'s table of kernels, held against the modules as they were compiled.

use std::{collections::BTreeMap, fs};

use fused_collective_bench::{launch as bench, table};
use fused_collective_core::{
    kernels::{Bounds, Module, Processor, bounds},
    launch,
};

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

/// Every module of a processor by name, with the entry points that the tables list for it.
fn listed(processor: Processor) -> BTreeMap<&'static str, BTreeMap<&'static str, Bounds>> {
    let library = Module::all().map(|module| {
        let bounded = |name| (name, bounds(processor.name, module.dtype, module.set, name));
        (module.name(), module.set.entries(processor.has_clusters()).map(bounded).collect())
    });
    let bench = table::modules()
        .map(|module| (module, table::entries(module).map(|name| (name, table::BOUNDS)).collect()));
    library.chain(bench).collect()
}

#[test]
fn modules_have_the_entry_points_of_the_table_and_no_others() {
    for processor in Processor::ALL {
        for (module, listed) in listed(processor) {
            let ptx = read(&folder().join(processor.name).join(format!("{module}.ptx")));
            assert_eq!(entries(&ptx), listed, "{module} for {}", processor.name);
        }
    }
}

#[test]
fn there_are_the_modules_of_the_table_and_no_others() {
    for processor in Processor::ALL {
        let files = fs::read_dir(folder().join(processor.name)).unwrap();
        let files = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        // Machine code, where it was kept, lies beside the PTX that it is of.
        let (mut machine_code, mut compiled): (Vec<_>, Vec<_>) =
            files.partition(|file| file.ends_with(".cubin"));
        compiled.sort();
        machine_code.sort();
        let of_listed = |extension| -> Vec<String> {
            listed(processor).keys().map(|module| format!("{module}.{extension}")).collect()
        };
        assert_eq!(compiled, of_listed("ptx"), "{}", processor.name);
        assert!(machine_code.is_empty() || machine_code == of_listed("cubin"), "{machine_code:?}");
    }
}

#[test]
fn modules_carry_the_fingerprints_of_what_they_are_launched_with() {
    for processor in Processor::ALL {
        for module in listed(processor).keys() {
            let ptx = read(&folder().join(processor.name).join(format!("{module}.ptx")));
            let own = table::modules().any(|name| name == *module).then_some(bench::LAYOUT);
            let found = (launch::layout_of(&ptx), bench::layout_of(&ptx));
            assert_eq!(found, (Some(launch::LAYOUT), own), "{module} for {}", processor.name);
        }
    }
}
