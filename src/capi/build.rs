//! The name that programs are linked to: it changes with the ABI. And the library stays once it is loaded: threads of
//! ports end by themselves, some time after a plugin that uses it has closed its engine and was unloaded.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libctoffload.so.0");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
