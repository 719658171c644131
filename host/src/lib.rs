//! Fused all-reduce + residual + RMSNorm + quantization across the ranks of one host.

pub mod bench;
pub mod cli;
pub mod collective;
pub mod cpu;
pub mod launch;
pub mod program;
pub mod rank_env;
pub mod rendezvous;
pub mod report;
pub mod settings;
