//! RMSNorm.
