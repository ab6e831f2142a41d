//! The header and this library are of one mind.

use std::fmt::Write as _;
use std::process::Command;

use crate::values;

const HEADER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/include/ctoffload.h");

/// Sizes and places of all members, as a C compiler has them of the header.
#[test]
fn every_struct_of_the_header_is_laid_out_as_here() {
    let layouts = values::layouts();
    let mut program = format!("#include \"{HEADER}\"\n#include <stdio.h>\nint main(void) {{\n");
    let mut ours = String::new();
    for (name, size, members) in &layouts {
        let _ = writeln!(program, "printf(\"{name} %zu\\n\", sizeof(struct {name}));");
        let _ = writeln!(ours, "{name} {size}");
        let mut end = 0;
        for (member, offset, size) in members {
            let _ = writeln!(
                program,
                "printf(\"{name}.{member} %zu %zu\\n\", offsetof(struct {name}, {member}), sizeof ((struct {name} *) 0)->{member});"
            );
            let _ = writeln!(ours, "{name}.{member} {offset} {size}");
            assert_eq!(*offset, end, "{name}: padding in front of {member}");
            end = offset + size;
        }
        assert_eq!(end, *size, "{name}: padding at its end");
    }
    program.push_str("}\n");
    let dir = std::env::temp_dir().join(format!("ctoffload-layout-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let (source, binary) = (dir.join("layout.c"), dir.join("layout"));
    std::fs::write(&source, program).unwrap();
    let compiled = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Werror", "-Wpadded", "-o"])
        .args([&binary, &source])
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let output = Command::new(&binary).output().unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), ours);
    // Each struct of the header but those that are only named, and the connection, is one of these.
    let header = std::fs::read_to_string(HEADER).unwrap();
    let defined = header.lines().filter(|l| l.starts_with("struct ") && l.ends_with(" {")).count();
    assert_eq!(defined, layouts.len() + 1, "a struct is missing here");
}
