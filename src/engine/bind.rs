//! Which class a netdev is bound to.

use std::sync::Arc;
use std::time::Duration;

use netdev_providers::{
    BindError, Fault, HwFlags, Ifindex, Instance, Netdev, Provider, ProviderClass,
};

use super::contain::contained;
use super::port::{Binding, Chosen, Refusal};

type Classes = [Arc<dyn ProviderClass>];

/// How often a class is asked that fails because the kernel is busy, and the pause between.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(50);

/// Binds a netdev to the first class that accepts: of its list, in that order, or without one (`by_default`) of all:
/// first of those that a NIC carries rules of. Nobody accepts: there is no binding. What dead engines have left of
/// other classes is removed (`all`).
pub(super) fn bind(
    netdev: &Netdev,
    instance: Instance,
    classes: &Classes,
    by_default: bool,
    all: &Classes,
) -> (Option<Binding>, Vec<Refusal>) {
    let rounds: &[Chosen] = match (by_default, netdev.hw_flags) {
        (false, _) => &[Chosen::Listed],
        (true, HwFlags::SkipHw) => &[Chosen::First],
        (true, _) => &[Chosen::InHardware, Chosen::First],
    };
    let mut refusals = Vec::new();
    let mut asked = rounds.iter().flat_map(|&how| classes.iter().map(move |class| (how, class)));
    let binding = asked.find_map(|(how, class)| {
        let bound = ask(how, &**class, netdev, instance).and_then(|provider| {
            // What a dead engine's other class has there was in its way, and its own is in the way of that one's
            // qdisc: it looks again.
            let others = || all.iter().filter(|c| c.name() != class.name());
            let has = |c: &Arc<dyn ProviderClass>| contained(|| c.has_leftovers(netdev.ifindex));
            let in_its_way = others().any(|c| has(c).unwrap_or(false));
            if in_its_way {
                release(netdev, &*provider);
            }
            clear(all, Some(class.name()), netdev.ifindex);
            if in_its_way { ask(how, &**class, netdev, instance) } else { Ok(provider) }
        });
        match bound {
            Ok(provider) => Some(Binding { class: class.name(), chosen: how, provider }),
            Err(why) => {
                let round = if how == Chosen::InHardware { "in hardware: " } else { "" };
                let why = format!("{round}{why}");
                tracing::info!(port = %netdev, class = class.name(), why, "not bound");
                refusals.push(Refusal { class: class.name(), why });
                None
            }
        }
    });
    if binding.is_none() {
        clear(all, None, netdev.ifindex);
    }
    (binding, refusals)
}

fn ask(
    how: Chosen,
    class: &dyn ProviderClass,
    netdev: &Netdev,
    instance: Instance,
) -> Result<Arc<dyn Provider>, String> {
    let mut tries = 1;
    loop {
        let asked = contained(|| match how {
            Chosen::InHardware => class.bind_in_hardware(netdev, instance),
            Chosen::Listed | Chosen::First => class.bind(netdev, instance),
        });
        match asked {
            Ok(Ok(provider)) => return Ok(provider),
            // A netdev has its provider for as long as it is a port: not another one because the kernel was busy.
            Ok(Err(BindError::Failed(fault))) if may_pass(&fault) && tries < TRIES => {
                tracing::info!(port = %netdev, class = class.name(), "bind is tried again: {fault}");
                std::thread::sleep(PAUSE);
                tries += 1;
            }
            Ok(Err(BindError::Failed(fault))) => return Err(fault.to_string()),
            Ok(Err(BindError::Declined(why))) | Err(why) => return Err(why),
        }
    }
}

/// Whether the kernel was busy, or short of memory.
fn may_pass(fault: &Fault) -> bool {
    use nix::errno::Errno::{EAGAIN, EBUSY, EINTR, ENOBUFS, ENOMEM};
    fault.errno.is_some_and(|errno| [EAGAIN, EBUSY, EINTR, ENOBUFS, ENOMEM].contains(&errno))
}

/// The last call of a provider that has no port, or none any more.
pub(super) fn release(netdev: &Netdev, provider: &dyn Provider) {
    let released = contained(|| provider.release());
    if let Ok(Err(fault)) | Err(fault) = released.map_err(Fault::new) {
        tracing::warn!(port = %netdev, "release: {fault}");
    }
}

/// Removes what engines that died have left on a netdev, of all classes but one.
pub(super) fn clear(classes: &Classes, but: Option<&str>, ifindex: Ifindex) {
    for class in classes.iter().filter(|c| Some(c.name()) != but) {
        let cleared = contained(|| class.clear_leftovers(ifindex));
        match cleared.unwrap_or_else(|panicked| Err(Fault::new(panicked))) {
            Ok(0) => {}
            Ok(rules) => {
                tracing::info!(%ifindex, class = class.name(), rules, "left by a dead engine: removed");
            }
            Err(fault) => {
                tracing::warn!(%ifindex, class = class.name(), "leftovers of a dead engine: {fault}");
            }
        }
    }
}
