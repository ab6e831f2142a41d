//! Kernel modules that are not there, or not yet. These tests unload modules, which whoever uses them keeps
//! from happening: `alone_` in their names has them run when nothing else does.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::{self, File};
use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ctoffload::datapath::netfilter::ledger::{Ledger, LedgerConfig};
use netdev_providers::nf_flowtable::NfFlowtableClass;
use netdev_providers::tc_flower::TcFlowerClass;
use netdev_providers::{BindError, HwFlags, Instance, Provider, ProviderClass};
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::netns::NetNs;
use crate::submit::netdev;
use crate::wait::wait_until;

/// `linux/module.h`.
const MODULE_INIT_COMPRESSED_FILE: u32 = 4;

/// What the kernel runs when it wants a module.
struct Modprobe(String);

impl Modprobe {
    const PATH: &str = "/proc/sys/kernel/modprobe";

    fn is(program: &str) -> Self {
        let before = fs::read_to_string(Self::PATH).unwrap();
        fs::write(Self::PATH, program).unwrap();
        Self(before)
    }

    /// Nothing is loaded: a kernel that lacks the modules.
    fn none() -> Self {
        Self::is("/bin/false")
    }
}

impl Drop for Modprobe {
    fn drop(&mut self) {
        let _ = fs::write(Self::PATH, &self.0);
    }
}

/// Runs `f` while these modules are being loaded by somebody else: whoever asks for one of them is told that
/// it is loaded, which it is a little later.
fn while_loading(ns: &NetNs, modules: &[&str], f: impl FnOnce()) {
    let dir = std::env::temp_dir();
    let (program, asked) = (dir.join("late-modprobe"), dir.join("late-modprobe.asked"));
    fs::write(&program, format!("#!/bin/sh\n: >{}\n", asked.display())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let files: Vec<_> = modules
        .iter()
        .map(|module| {
            let path = ns.run(&format!("modinfo -n {module}"));
            unload(ns, module);
            File::open(path.trim_end()).unwrap()
        })
        .collect();
    let _late = Modprobe::is(program.to_str().unwrap());
    thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("a module is asked for", || asked.exists());
            thread::sleep(Duration::from_millis(100));
            for file in files.iter().rev() {
                // Debian compresses those of 6.12.
                let loaded = [0, MODULE_INIT_COMPRESSED_FILE].into_iter().any(|flags| {
                    finit_module(file, c"", ModuleInitFlags::from_bits_retain(flags)).is_ok()
                });
                assert!(loaded, "{file:?}");
            }
        });
        f();
    });
    fs::remove_file(&asked).unwrap();
}

/// A network namespace with a netdev `p0`.
fn network() -> NetNs {
    let ns = NetNs::new();
    ns.run("ip link add name p0 type veth peer name p1 && ip link set p0 up");
    ns
}

fn bind(class: &dyn ProviderClass) -> Result<Arc<dyn Provider>, BindError> {
    class.bind(&netdev("p0", HwFlags::SkipHw), Instance(NonZeroU32::MIN))
}

/// Namespaces of tests before may still be on their way out, with what they use.
fn unload(ns: &NetNs, module: &str) {
    let unloaded = || ns.try_run(&format!("rmmod {module}")).status.success();
    wait_until(&format!("{module} is unloaded"), unloaded);
}

#[test]
fn alone_what_a_flowtable_lacks_is_named() {
    let ns = network();
    let class = NfFlowtableClass::default();
    bind(&class).unwrap().release().unwrap();
    for module in ["nft_flow_offload", "nf_flow_table_inet"] {
        let _none = Modprobe::none();
        unload(&ns, module);
        let Err(BindError::Declined(why)) = bind(&class) else { panic!("{module}: not declined") };
        assert!(why.contains("the kernel lacks") && why.contains(module), "{module}: {why}");
        assert!(!ns.run("nft list tables").contains("ctoffload"), "nothing is left behind");
    }
    bind(&class).unwrap().release().unwrap();
}

#[test]
fn alone_what_flower_lacks_is_named() {
    let ns = network();
    let class = TcFlowerClass::default();
    bind(&class).unwrap().release().unwrap();
    for (module, is_needed) in [("cls_bpf", true), ("act_mirred", true), ("act_police", false)] {
        let none = Modprobe::none();
        unload(&ns, module);
        match bind(&class) {
            Err(BindError::Declined(why)) if is_needed => {
                assert!(why.contains(module), "{module}: {why}");
            }
            Ok(port) if !is_needed => {
                let all = port.capabilities();
                let police = all.iter().find(|c| c.name == "action police").unwrap();
                let why = police.software.clone().unwrap().unwrap_err();
                assert!(why.contains("Failed to load TC action module"), "{why}");
                port.release().unwrap();
            }
            other => panic!("{module}: {:?}", other.map(|port| port.describe())),
        }
        assert!(!ns.run("tc qdisc show dev p0").contains("ffff:"), "nothing is left behind");
        drop(none);
        bind(&class).unwrap().release().unwrap();
    }
}

/// Rules in software that have programs are refused, in words; what needs none is served.
#[test]
fn alone_what_needs_act_bpf_is_refused_without_it() {
    let ns = network();
    let class = TcFlowerClass::default();
    bind(&class).unwrap().release().unwrap();
    let _none = Modprobe::none();
    unload(&ns, "act_bpf");
    let port = bind(&class).unwrap();
    let described = port.describe();
    assert!(described.contains("act_bpf"), "{described}");
    let all = port.capabilities();
    let software = |name: &str| all.iter().find(|c| c.name == name).unwrap().software.clone();
    assert_eq!(software("flow ipv6 udp"), Some(Ok(())));
    for name in ["flow ipv4 udp", "flow ipv6 udp nat"] {
        assert_eq!(software(name), None, "{name}: there is nothing to try");
    }
    port.release().unwrap();
}

/// Two that start at boot ask for the same modules: what the other one's request has begun to load is
/// not a thing that the kernel lacks.
#[test]
fn alone_what_is_being_loaded_is_waited_for() {
    let ns = network();
    let ledger = || Ledger::install(LedgerConfig::default());
    let (flower, flowtable) = (TcFlowerClass::default(), NfFlowtableClass::default());
    // Whatever else they load is there then.
    ledger().unwrap().remove().unwrap();
    bind(&flower).unwrap().release().unwrap();
    bind(&flowtable).unwrap().release().unwrap();
    while_loading(&ns, &["nft_limit"], || ledger().unwrap().remove().unwrap());
    while_loading(&ns, &["nft_flow_offload", "nf_flow_table_inet"], || {
        bind(&flowtable).unwrap().release().unwrap();
    });
    for module in ["cls_bpf", "cls_flower", "act_mirred", "act_police"] {
        while_loading(&ns, &[module], || {
            let port = bind(&flower).unwrap();
            let all = port.capabilities();
            assert!(all.iter().all(|c| c.software == Some(Ok(()))), "{module}: {all:?}");
            port.release().unwrap();
        });
    }
}
