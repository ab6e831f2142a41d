//! The program of the `ebpf` backend: compiled, where there is a clang, else taken as it was checked in.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

const DIR: &str = "src/ebpf/bpf";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={DIR}");
    if env::var_os("CARGO_FEATURE_EBPF").is_none() {
        return;
    }
    let object = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("flows.bpf.o");
    let compiled = Command::new(format!("{DIR}/compile")).arg(&object).output();
    if !compiled.is_ok_and(|out| out.status.success()) {
        fs::copy(format!("{DIR}/flows.bpf.o"), &object).expect("the object is part of the sources");
    }
}
