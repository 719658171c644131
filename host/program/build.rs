//! Has the program carry the archive that `cargo xtask kernels` made, if there is one.

use std::path::Path;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(embedded)");
    // The folder is always there: for a path that is missing, cargo would build again and again.
    println!("cargo::rerun-if-changed=archive");
    if Path::new("archive/kernels.archive").exists() {
        println!("cargo::rustc-cfg=embedded");
    }
}
