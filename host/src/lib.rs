//! Fused all-reduce + residual + RMSNorm + quantization across the ranks of one host.
