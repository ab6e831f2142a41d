//! The program, as clang made it, and how it is loaded.

use std::sync::{Mutex, PoisonError};

use aya::maps::Map;
use aya::programs::{ProgramError, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel, include_bytes_aligned};

use super::maps::{Egress, errno_of};
use super::pins::Pins;
use crate::bpf::load::insist;
use crate::contract::provider::Fault;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/flows.bpf.o"));

/// The array with the table in it.
pub(super) const CURRENT: &str = "current_flows";
/// The netdevs that rules lead to.
pub(super) const EGRESS: &str = "egress_netdevs";

/// Whatever the library said, in its words and those of what is behind it.
pub(super) fn fault(what: &str, e: &(dyn std::error::Error + 'static)) -> Fault {
    let mut detail = e.to_string();
    let mut source = e.source();
    while let Some(e) = source {
        let more = e.to_string();
        if !detail.contains(&more) {
            detail = format!("{detail}: {more}");
        }
        source = e.source();
    }
    // What the verifier has to say at its end is what matters.
    if let Some(ProgramError::LoadError { verifier_log, .. }) = e.downcast_ref::<ProgramError>() {
        let log = verifier_log.to_string();
        let last = log.lines().rev().find(|l| !l.is_empty() && !l.starts_with("processed"));
        detail = last.unwrap_or(&detail).to_owned();
    }
    Fault { what: what.to_owned(), errno: errno_of(e), detail: Some(detail) }
}

/// Loads objects: one for each port, with maps of its own.
#[derive(Default)]
pub(super) struct Loader(
    /// For maps that are not pinned, and for those that are. Making one reads all types of the kernel, which takes a
    /// while, although nothing of ours depends on them.
    Mutex<[Option<EbpfLoader<'static>>; 2]>,
);

impl Loader {
    /// Makes the maps of a port, or takes those that are pinned.
    pub(super) fn load(&self, pins: Option<&Pins>) -> Result<Object, Fault> {
        let mut loaders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let loader = loaders[usize::from(pins.is_some())].get_or_insert_with(|| {
            let mut loader = EbpfLoader::new();
            loader.btf(None).verifier_log_level(VerifierLogLevel::DISABLE);
            loader
        });
        if let Some(pins) = pins {
            loader
                .map_pin_path(CURRENT, pins.path(CURRENT))
                .map_pin_path(EGRESS, pins.path(EGRESS));
        }
        loader.load(OBJECT).map(Object).map_err(|e| fault("loading the BPF object", &e))
    }
}

impl std::fmt::Debug for Loader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Loader")
    }
}

/// The maps of a port, and its program in either form.
#[derive(Debug)]
pub(super) struct Object(Ebpf);

impl Object {
    /// The array, and the netdevs. (Programs go on using them.)
    pub(super) fn take_maps(&mut self) -> Result<(Map, Egress), Fault> {
        let none = || Fault::new("the BPF object has other maps than it should have");
        let current = self.0.take_map(CURRENT).ok_or_else(none)?;
        let egress = self.0.take_map(EGRESS).ok_or_else(none)?;
        Ok((current, Egress::new(egress)))
    }

    /// The program for XDP, loaded.
    pub(super) fn xdp(&mut self) -> Result<&mut Xdp, Fault> {
        let program = self.0.program_mut("forward_xdp");
        let program = program.ok_or_else(|| Fault::new("the BPF object has no forward_xdp"))?;
        let what = "loading the program for XDP";
        let program: &mut Xdp = program.try_into().map_err(|e: ProgramError| fault(what, &e))?;
        if program.fd().is_err() {
            insist(perhaps_again, || program.load()).map_err(|e| fault(what, &e))?;
        }
        Ok(program)
    }

    /// The program for tc, loaded.
    pub(super) fn tc(&mut self) -> Result<&mut SchedClassifier, Fault> {
        let program = self.0.program_mut("forward_tc");
        let program = program.ok_or_else(|| Fault::new("the BPF object has no forward_tc"))?;
        let what = "loading the program for tc";
        let program: &mut SchedClassifier =
            program.try_into().map_err(|e: ProgramError| fault(what, &e))?;
        if program.fd().is_err() {
            insist(perhaps_again, || program.load()).map_err(|e| fault(what, &e))?;
        }
        Ok(program)
    }
}

/// A program that could not be loaded: with which error is not known. The library has asked once more by then, with
/// room for a log that nobody wants, and that is refused without a word (EINVAL).
const fn perhaps_again(e: &ProgramError) -> bool {
    matches!(e, ProgramError::LoadError { .. })
}
