//! The provider class: options, and [`bind`](ProviderClass::bind).

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use tracing::{debug, info};

use super::choose::Choice;
pub use super::choose::Mode;
use super::clsact::Clsact;
use super::maps::{Flows, id_of};
use super::object::{CURRENT, Loader, fault};
use super::pins::Pins;
use super::place::{Standing, remove_stray_filter};
use super::provider::{About, Ebpf};
use super::shared::Shared;
use super::writer::{Parts, Writer};
use crate::contract::class::{BindError, ProviderClass};
use crate::contract::provider::{Fault, Provider};
use crate::contract::types::{HwFlags, Ifindex, Instance, Netdev};
use crate::netlink::error::NetlinkError;
use crate::netlink::link::{Link, Links};

/// `ARPHRD_ETHER` (`linux/if_arp.h`).
const ARPHRD_ETHER: u16 = 1;

/// Options of the class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EbpfConfig {
    /// How ports forward; `None`: as each netdev can best.
    pub mode: Option<Mode>,
    /// How many rules a port takes at most. Memory comes with the rules, but for 16 bytes each.
    pub max_rules: u32,
    /// A directory in bpffs, where what outlives the daemon is pinned. Where it is in none, nothing does.
    pub pins: PathBuf,
}

impl Default for EbpfConfig {
    fn default() -> Self {
        Self { mode: None, max_rules: 262_144, pins: "/sys/fs/bpf/ctoffload".into() }
    }
}

/// The class `ebpf`: a BPF program and a table for each port. See the [module](super).
#[derive(Debug, Default)]
pub struct EbpfClass {
    config: EbpfConfig,
    loader: Loader,
}

impl EbpfClass {
    /// A class with these options.
    #[must_use]
    pub fn new(config: EbpfConfig) -> Self {
        Self { config, ..Self::default() }
    }

    fn bind_netdev(&self, link: &Link, instance: Instance) -> Result<Ebpf, BindError> {
        let ifindex = link.ifindex;
        let failed =
            |what: &'static str| move |e: NetlinkError| BindError::Failed(e.into_fault(what));
        let choice = Choice::of(link, self.config.mode).map_err(failed("reading the netdev"))?;
        let (pins, not_pinned) =
            match Pins::of(&self.config.pins, ifindex).and_then(|p| p.make().map(|()| p)) {
                Ok(pins) => (Some(pins), None),
                Err(e) => (None, Some(e.to_string())),
            };
        let undo = |e: BindError| {
            if let Some(pins) = &pins {
                let _ = pins.remove();
            }
            e
        };
        let (object, maps, standing, not_xdp) =
            self.stand(ifindex, &choice, pins.as_ref()).map_err(undo)?;
        let Maps { current, egress, flows } = maps;
        let about = About {
            place: standing.place,
            not_xdp: choice.not_xdp.or(not_xdp),
            not_pinned,
            capacity: self.config.max_rules,
        };
        let around = standing.around().unwrap_or_default();
        let shared = Shared::new(Arc::clone(&flows), around, about.place);
        let capacity = self.config.max_rules;
        let parts = Parts { ifindex, object, pins, current, flows, egress, standing, capacity };
        let writer = Writer::new(parts).inspect_err(|_| {
            // The program stands by its pin alone now, or as a filter.
            let _ = self.clear_leftovers(ifindex);
        })?;
        Ok(Ebpf { ifindex, instance, shared, writer: Mutex::new(writer), about })
    }

    /// Takes over what a dead engine has left, or puts a program with an empty table there.
    fn stand(
        &self,
        ifindex: Ifindex,
        choice: &Choice,
        pins: Option<&Pins>,
    ) -> Result<(super::object::Object, Maps, Standing, Option<String>), BindError> {
        if let Some(pins) = pins {
            let others = pins.remove_others(ifindex);
            others.map_err(|e| BindError::Failed(fault("removing pins of another version", &e)))?;
            match self.take_over(ifindex, choice, pins) {
                Ok(Some((object, maps, standing))) => return Ok((object, maps, standing, None)),
                Ok(None) => {}
                Err(e) => debug!(%ifindex, "what a dead engine has left is of no use: {e}"),
            }
            // None of it is used.
            let begin_anew = pins.remove().and_then(|()| pins.make());
            begin_anew.map_err(|e| BindError::Failed(fault("removing pins", &e)))?;
        }
        remove_stray_filter(ifindex)
            .map_err(|e| BindError::Failed(e.into_fault("removing a filter of a dead engine")))?;
        let mut object = self.loader.load(pins).map_err(declined)?;
        let (mut current, egress) = object.take_maps().map_err(BindError::Failed)?;
        let flows = Flows::replace(&mut current, self.config.max_rules)
            .map_err(|e| BindError::Failed(fault("making the table", &e)))?;
        let mut why_not = Vec::new();
        for &place in &choice.places {
            match Standing::put(place, ifindex, &mut object, pins) {
                Ok(standing) => {
                    let not_xdp = (!why_not.is_empty()).then(|| why_not.join("; "));
                    return Ok((object, Maps { current, egress, flows }, standing, not_xdp));
                }
                Err(e) if e.is_netdev_gone() => return Err(BindError::Failed(e)),
                Err(e) => why_not.push(format!("{place}: {e}")),
            }
        }
        why_not.extend(choice.not_xdp.iter().map(|why| format!("XDP: {why}")));
        Err(BindError::Declined(why_not.join("; ")))
    }

    /// `None`: nothing was left.
    fn take_over(
        &self,
        ifindex: Ifindex,
        choice: &Choice,
        pins: &Pins,
    ) -> Result<Option<(super::object::Object, Maps, Standing)>, Fault> {
        if !pins.has(super::object::CURRENT) || !pins.has(super::object::EGRESS) {
            return Ok(None);
        }
        let mut object = self.loader.load(Some(pins))?;
        let (current, egress) = object.take_maps()?;
        let map = id_of(&current).ok_or_else(|| Fault::new("the pinned map has no id"))?;
        let flows = Flows::of(&current).map_err(|e| fault("reading the pinned table", &e))?;
        let capacity = flows.capacity().map_err(|e| fault("reading the pinned table", &e))?;
        if capacity != self.config.max_rules {
            return Err(Fault::new("another number of rules is configured now"));
        }
        let standing = Standing::find(ifindex, pins, map)?;
        let Some(standing) = standing.filter(|s| choice.places.contains(&s.place)) else {
            return Ok(None);
        };
        let standing = standing.replace(&mut object)?;
        Ok(Some((object, Maps { current, egress, flows }, standing)))
    }
}

/// The maps of a port.
struct Maps {
    current: aya::maps::Map,
    egress: super::maps::Egress,
    flows: Arc<Flows>,
}

fn declined(e: Fault) -> BindError {
    match e.errno {
        // A kernel without one of the maps, or without the system call.
        Some(Errno::EINVAL | Errno::ENOSYS | Errno::EPERM | Errno::EOPNOTSUPP) => {
            BindError::Declined(e.to_string())
        }
        _ => BindError::Failed(e),
    }
}

fn link_of(ifindex: Ifindex) -> Result<Link, Fault> {
    let what = "reading the netdev";
    let link = Links::open().and_then(|mut l| l.get(ifindex)).map_err(|e| e.into_fault(what))?;
    link.ok_or_else(|| Fault { errno: Some(Errno::ENODEV), ..Fault::new(what) })
}

impl ProviderClass for EbpfClass {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn init(&self) -> Result<(), Fault> {
        if self.config.max_rules == 0 || self.config.max_rules > 1 << 26 {
            return Err(Fault::new(format!("max_rules {}: 1 to 2^26", self.config.max_rules)));
        }
        Ok(())
    }

    fn bind(&self, netdev: &Netdev, instance: Instance) -> Result<Arc<dyn Provider>, BindError> {
        let decline = |why: String| Err(BindError::Declined(why));
        if !netdev.ifindex.is_netdev() {
            return decline("a port of the datapath's own, and no netdev".into());
        }
        let link = link_of(netdev.ifindex)?;
        if link.hardware_type != ARPHRD_ETHER {
            return decline(format!("not an Ethernet netdev (ARPHRD {})", link.hardware_type));
        }
        if netdev.hw_flags == HwFlags::SkipSw {
            return decline("a program forwards in software (skip_sw is asked for)".into());
        }
        let provider = self
            .bind_netdev(&link, instance)
            .inspect_err(|e| debug!(%netdev, "ebpf not bound: {e}"))?;
        info!(%netdev, "ebpf bound: {}", provider.describe());
        Ok(Arc::new(provider))
    }

    fn bind_in_hardware(&self, _: &Netdev, _: Instance) -> Result<Arc<dyn Provider>, BindError> {
        Err(BindError::Declined("a program forwards in software".into()))
    }

    fn has_leftovers(&self, ifindex: Ifindex) -> bool {
        let pinned = || Pins::of(&self.config.pins, ifindex).is_ok_and(|p| p.has(CURRENT));
        let filter = || Clsact::open(ifindex).and_then(|mut c| c.filter());
        ifindex.is_netdev() && (pinned() || filter().is_ok_and(|f| f.is_some()))
    }

    fn clear_leftovers(&self, ifindex: Ifindex) -> Result<u64, Fault> {
        if !ifindex.is_netdev() {
            return Ok(0);
        }
        let mut rules = 0;
        if let Ok(pins) = Pins::of(&self.config.pins, ifindex) {
            if pins.has(super::object::CURRENT) {
                let map = aya::maps::MapData::from_pin(pins.path(super::object::CURRENT))
                    .and_then(aya::maps::Map::from_map_data);
                if let Ok(map) = map {
                    let standing = id_of(&map).map(|id| Standing::find(ifindex, &pins, id));
                    if let Ok(flows) = Flows::of(&map) {
                        let counted = flows.read(|_, _| rules += 1);
                        counted.map_err(|e| fault("reading the table", &e))?;
                    }
                    if let Some(Ok(Some(standing))) = standing {
                        standing.remove().map_err(|e| e.into_fault("removing the filter"))?;
                    }
                }
            }
            pins.remove_others(ifindex).map_err(|e| fault("removing pins", &e))?;
            pins.remove().map_err(|e| fault("removing pins", &e))?;
        }
        match remove_stray_filter(ifindex) {
            Err(e) if e.errno() != Some(Errno::ENODEV) => {
                Err(e.into_fault("removing a filter of a dead engine"))
            }
            _ => Ok(rules),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::types::Generation;
    use std::num::NonZeroU32;

    fn netdev(ifindex: Ifindex, hw_flags: HwFlags) -> Netdev {
        Netdev { ifindex, generation: Generation::new(1).unwrap(), name: "x".into(), hw_flags }
    }

    #[test]
    fn what_no_program_can_be_put_on_is_declined() {
        let class = EbpfClass::default();
        let why = |netdev: Netdev| match class.bind(&netdev, Instance(NonZeroU32::MIN)) {
            Err(BindError::Declined(why)) => why,
            other => panic!("{:?}", other.map(|p| p.describe())),
        };
        assert!(why(netdev(Ifindex::local(3).unwrap(), HwFlags::Both)).contains("no netdev"));
        // The loopback netdev.
        assert!(why(netdev(Ifindex::new(1).unwrap(), HwFlags::Both)).contains("ARPHRD 772"));
        assert_eq!(class.clear_leftovers(Ifindex::local(3).unwrap()), Ok(0));
    }

    #[test]
    fn options_that_cannot_work_are_refused_at_registration() {
        assert!(EbpfClass::default().init().is_ok());
        for max_rules in [0, u32::MAX] {
            let config = EbpfConfig { max_rules, ..EbpfConfig::default() };
            assert!(EbpfClass::new(config).init().is_err());
        }
    }
}
