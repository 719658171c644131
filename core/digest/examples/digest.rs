//! Prints the digest of the processor that it runs on.

fn main() {
    println!("{:016x}", fused_collective_digest::digest());
}
