//! The `memferry` binary.

fn main() {}
