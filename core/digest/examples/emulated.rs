//! Prints the digest that a file of PTX computes, run by the emulator: `emulated FILE.ptx`.

use std::{env, error::Error, fs, iter, mem::MaybeUninit, time::Duration};

use fused_collective_emulator::{Geometry, Grid, Memory, Module};

fn main() -> Result<(), Box<dyn Error>> {
    let file = env::args_os().nth(1).ok_or("name a file of PTX")?;
    let module = Module::parse(&fs::read_to_string(file)?)?;
    let entry = module.entry("digest").ok_or("the file has no entry point `digest`")??;
    let mut out = Box::new(0u64);
    let start = (&raw mut *out).expose_provenance() as u64;
    let parameter = start.to_ne_bytes().map(MaybeUninit::new);
    // SAFETY: the number lives as long as the grid runs, which alone accesses it meanwhile.
    let memory = unsafe { Memory::new(iter::once(start..start + 8).collect()) };
    let geometry = Geometry { blocks: 1, cluster: 1, threads: 32 };
    let timeout = Duration::from_secs(100);
    let grid = Grid { entry: &entry, geometry, parameter: &parameter, memory: &memory, seed: 0, timeout };
    // SAFETY: the parameter is initialized.
    unsafe { grid.run() }?;
    // SAFETY: as above; read anew, as the grid wrote it by address.
    println!("{:016x}", unsafe { (&raw const *out).read_volatile() });
    Ok(())
}
