//! Writes what a package has of the command lines: pages of the manual, and completions for shells.
//!
//! manual DIRECTORY     DIRECTORY/man/*.8, DIRECTORY/bash, zsh, fish

use std::error::Error;
use std::fs;
use std::path::Path;

use clap_complete::{Shell, generate_to};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

/// Sections of a page that the command line does not have.
const FILES: &str =
    "/etc/ctoffload/ctoffload.toml: the configuration, with every option and its default.";

fn main() -> Result<(), Box<dyn Error>> {
    let to = std::env::args_os().nth(1).ok_or("a directory is needed")?;
    let to = Path::new(&to);
    fs::create_dir_all(to.join("man"))?;
    let programs = [
        (ctoffload::cli::command(), "ctoffloadd(8)"),
        (ctoffload::daemon::command(), "ctoffload(8)"),
    ];
    for (command, see) in programs {
        let name = command.get_name().to_owned();
        let mut page = Vec::new();
        // The date is no part of it: the same source makes the same page.
        Man::new(command.clone()).section("8").manual("ctoffload").date("").render(&mut page)?;
        let mut rest = Roff::new();
        rest.control("SH", ["FILES"]).text([roman(FILES)]);
        rest.control("SH", ["SEE ALSO"]).text([roman(see)]);
        page.extend(rest.render().into_bytes());
        fs::write(to.join("man").join(format!("{name}.8")), page)?;
        for sub in command.get_subcommands().filter(|c| !c.is_hide_set()) {
            let page_name = format!("{name}-{}", sub.get_name());
            let mut page = Vec::new();
            let sub = sub.clone().display_name(page_name.clone());
            Man::new(sub).section("8").manual("ctoffload").date("").render(&mut page)?;
            fs::write(to.join("man").join(format!("{page_name}.8")), page)?;
        }
        for (shell, dir) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
            fs::create_dir_all(to.join(dir))?;
            generate_to(shell, &mut command.clone(), &name, to.join(dir))?;
        }
    }
    Ok(())
}
