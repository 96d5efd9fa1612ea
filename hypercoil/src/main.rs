//! hypercoil
fn main() {}
