//! Where the program of a port stands: how it is put there, found again, replaced, taken away; and who is in front of it
//! and behind.

use std::os::fd::AsFd;
use std::{fmt, io};

use aya::programs::links::{FdLink, LinkType, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::{XdpLink, XdpMode};
use aya::programs::{LinkOrder, ProgramError, TcAttachType};
use nix::errno::Errno;
use tracing::debug;

use super::clsact::{Clsact, Filter, PRIO};
use super::object::{Object, fault};
use super::pins::Pins;
use crate::bpf::{detach_link, program_maps, tcx_ingress};
use crate::contract::provider::Fault;
use crate::contract::types::Ifindex;
use crate::netlink::error::NetlinkError;
use crate::netlink::front::{ALL, PARENT_INGRESS, filters, in_front, named, xdp_of};
use crate::netlink::link::Links;

/// `XDP_ATTACHED_DRV` (linux/if_link.h).
const NATIVE: u8 = 1;

/// Where a program can stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// XDP of the driver, by a link.
    Xdp,
    /// tcx, by a link, behind what is there.
    Tcx,
    /// A filter of the ingress qdisc.
    Clsact,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xdp => f.write_str("native XDP"),
            Self::Tcx => f.write_str("tcx"),
            Self::Clsact => write!(f, "cls_bpf at prio {PRIO}"),
        }
    }
}

/// A program that stands.
#[derive(Debug)]
pub(super) struct Standing {
    pub(super) place: Place,
    ifindex: Ifindex,
    /// Its id.
    program: u32,
    /// It stands as long as this is open, or pinned.
    link: Option<FdLink>,
    /// We made the qdisc that the filter stands at.
    made_qdisc: bool,
}

/// What packets pass beside the program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Around {
    /// Before it.
    pub(super) front: Vec<String>,
    /// Before they come to the stack, and not if the program forwards them.
    pub(super) behind: Vec<String>,
}

impl Standing {
    /// The program of a dead engine, which uses these maps (by the id of one of them). Others' are never taken for it.
    pub(super) fn find(ifindex: Ifindex, pins: &Pins, map: u32) -> Result<Option<Self>, Fault> {
        let found = if pins.link().exists() {
            let link = PinnedLink::from_pin(pins.link())
                .map_err(|e| fault("reading the pinned link", &e))?;
            let link = FdLink::from(link);
            let info = link.info().map_err(|e| fault("reading the pinned link", &e))?;
            let place = match info.link_type() {
                Ok(LinkType::Xdp) => Place::Xdp,
                Ok(LinkType::Tcx) => Place::Tcx,
                _ => return Ok(None),
            };
            let program = info.program_id();
            Self { place, ifindex, program, link: Some(link), made_qdisc: false }
        } else {
            let filter = Clsact::open(ifindex).and_then(|mut c| c.filter());
            let Ok(Some(Filter { program, made_qdisc })) = filter else { return Ok(None) };
            Self { place: Place::Clsact, ifindex, program, link: None, made_qdisc }
        };
        let stands =
            found.stands().map_err(|e| e.into_fault("reading what stands on the netdev"))?;
        Ok(Some(found).filter(|f| stands && program_maps(f.program).contains(&map)))
    }

    /// Puts the program there for the first time.
    pub(super) fn put(
        place: Place,
        ifindex: Ifindex,
        object: &mut Object,
        pins: Option<&Pins>,
    ) -> Result<Self, Fault> {
        let mut made_qdisc = false;
        let (program, link) = match place {
            Place::Xdp => Self::put_xdp(ifindex, object)?,
            Place::Tcx => Self::put_tcx(ifindex, object)?,
            Place::Clsact => {
                let what = "adding a filter";
                let mut clsact = Clsact::open(ifindex).map_err(|e| e.into_fault(what))?;
                made_qdisc =
                    clsact.add_qdisc().map_err(|e| e.into_fault("adding a clsact qdisc"))?;
                let put = clsact.filter().map_err(|e| e.into_fault(what)).and_then(|_| {
                    let program = object.tc()?;
                    let fd = program.fd().map_err(|e| fault(what, &e))?;
                    clsact.put(fd.as_fd(), made_qdisc).map_err(|e| e.into_fault(what))?;
                    Ok(program.info().map_err(|e| fault(what, &e))?.id())
                });
                match put {
                    Ok(program) => (program, None),
                    Err(e) => {
                        if made_qdisc {
                            let _ = clsact.delete_unused_qdisc();
                        }
                        return Err(e);
                    }
                }
            }
        };
        let mut standing = Self { place, ifindex, program, link, made_qdisc };
        if let Some(pins) = pins
            && let Err(e) = standing.pin(pins)
        {
            let _ = standing.remove();
            return Err(e);
        }
        Ok(standing)
    }

    fn put_xdp(ifindex: Ifindex, object: &mut Object) -> Result<(u32, Option<FdLink>), Fault> {
        let what = "attaching to XDP of the driver";
        let said = |e: ProgramError| {
            let mut e = fault(what, &e);
            // The kernel says no more than EBUSY.
            let there = xdp_of(ifindex).unwrap_or_default();
            if let (Some(Errno::EBUSY | Errno::EEXIST), Some((_, id))) = (e.errno, there.first()) {
                e.detail = Some(format!("the netdev has XDP program {} already", named(*id)));
            }
            e
        };
        let program = object.xdp()?;
        let id = program.info().map_err(|e| fault(what, &e))?.id();
        let link = program.attach_to_if_index(ifindex.get(), XdpMode::Driver).map_err(said)?;
        let link = program.take_link(link).map_err(|e| fault(what, &e))?;
        let link = link.try_into().map_err(|e| fault(what, &e))?;
        Ok((id, Some(link)))
    }

    fn put_tcx(ifindex: Ifindex, object: &mut Object) -> Result<(u32, Option<FdLink>), Fault> {
        let what = "attaching to tcx";
        let netlink = |e: NetlinkError| e.into_fault("reading the netdev");
        // The library takes names. One may become another's at any time: it is looked where it has landed.
        let name = Links::open().and_then(|mut l| l.get(ifindex)).map_err(netlink)?;
        let name = name.ok_or(Fault { errno: Some(Errno::ENODEV), ..Fault::new(what) })?.name;
        let program = object.tc()?;
        let id = program.info().map_err(|e| fault(what, &e))?.id();
        let last = TcAttachOptions::TcxOrder(LinkOrder::last());
        let link = program
            .attach_with_options(&name, TcAttachType::Ingress, last)
            .map_err(|e| fault(what, &e))?;
        let link = program.take_link(link).map_err(|e| fault(what, &e))?;
        if !tcx_ingress(ifindex).contains(&id) {
            return Err(Fault::new(format!(
                "{what}: {name} has become the name of another netdev"
            )));
        }
        let link = link.try_into().map_err(|e| fault(what, &e))?;
        Ok((id, Some(link)))
    }

    fn pin(&mut self, pins: &Pins) -> Result<(), Fault> {
        let what = "pinning the link";
        if let Some(link) = self.link.take() {
            let pinned = link.pin(pins.link()).map_err(|e| fault(what, &e))?;
            self.link = Some(pinned.into());
        }
        Ok(())
    }

    /// Puts the program in the place of the one that stands, at once: no packet passes neither or both.
    pub(super) fn replace(self, object: &mut Object) -> Result<Self, Fault> {
        let what = "replacing the program";
        let Self { place, ifindex, link, made_qdisc, .. } = self;
        let (program, link) = match (place, link) {
            (Place::Xdp, Some(link)) => {
                let program = object.xdp()?;
                let id = program.info().map_err(|e| fault(what, &e))?.id();
                let link = XdpLink::try_from(link).map_err(|e| fault(what, &e))?;
                let link = program.attach_to_link(link).map_err(|e| fault(what, &e))?;
                let link = program.take_link(link).map_err(|e| fault(what, &e))?;
                (id, Some(link.try_into().map_err(|e| fault(what, &e))?))
            }
            (Place::Tcx, Some(link)) => {
                let program = object.tc()?;
                let id = program.info().map_err(|e| fault(what, &e))?.id();
                let link = SchedClassifierLink::try_from(link).map_err(|e| fault(what, &e))?;
                let link = program.attach_to_link(link).map_err(|e| fault(what, &e))?;
                let link = program.take_link(link).map_err(|e| fault(what, &e))?;
                (id, Some(link.try_into().map_err(|e| fault(what, &e))?))
            }
            _ => {
                let program = object.tc()?;
                let fd = program.fd().map_err(|e| fault(what, &e))?;
                Clsact::open(ifindex)
                    .and_then(|mut c| c.put(fd.as_fd(), made_qdisc))
                    .map_err(|e| e.into_fault(what))?;
                (program.info().map_err(|e| fault(what, &e))?.id(), None)
            }
        };
        Ok(Self { place, ifindex, program, link, made_qdisc })
    }

    /// Whether it still stands there.
    pub(super) fn stands(&self) -> Result<bool, NetlinkError> {
        Ok(match self.place {
            Place::Xdp => xdp_of(self.ifindex)?.contains(&(NATIVE, self.program)),
            Place::Tcx => tcx_ingress(self.ifindex).contains(&self.program),
            Place::Clsact => {
                let filter = Clsact::open(self.ifindex)?.filter()?;
                filter.is_some_and(|f| f.program == self.program)
            }
        })
    }

    /// Who else is there.
    pub(super) fn around(&self) -> Result<Around, NetlinkError> {
        let all = |f: Vec<crate::netlink::front::InFront>| f.into_iter().map(|f| f.what).collect();
        let tcx = |id: &u32| format!("tcx program {}", named(*id));
        let mut around = Around::default();
        match self.place {
            Place::Xdp => {
                around.behind = tcx_ingress(self.ifindex).iter().map(tcx).collect();
                around.behind.extend(all(filters(self.ifindex, PARENT_INGRESS, ALL)?));
            }
            Place::Tcx => {
                let programs = tcx_ingress(self.ifindex);
                let at = programs.iter().position(|&id| id == self.program);
                let (front, behind) = programs.split_at(at.unwrap_or(programs.len()));
                let xdp = xdp_of(self.ifindex)?;
                around.front =
                    xdp.iter().map(|(_, id)| format!("XDP program {}", named(*id))).collect();
                around.front.extend(front.iter().map(tcx));
                around.behind = behind.iter().skip(1).map(tcx).collect();
                around.behind.extend(all(filters(self.ifindex, PARENT_INGRESS, ALL)?));
            }
            Place::Clsact => around.front = all(in_front(self.ifindex, PRIO)?),
        }
        Ok(around)
    }

    /// Takes it away. What is pinned goes with its pins.
    pub(super) fn remove(self) -> Result<(), NetlinkError> {
        if self.place != Place::Clsact {
            if let Some(link) = &self.link
                && let Err(e) =
                    link.info().map_err(io::Error::other).and_then(|i| detach_link(i.id()))
            {
                debug!(ifindex = %self.ifindex, "a link goes with its last descriptor: {e}");
            }
            return Ok(());
        }
        let remove = || {
            let mut clsact = Clsact::open(self.ifindex)?;
            if clsact.filter()?.is_some() {
                clsact.delete()?;
            }
            if self.made_qdisc { clsact.delete_unused_qdisc() } else { Ok(()) }
        };
        match remove() {
            Err(e) if e.errno() == Some(Errno::ENODEV) => Ok(()),
            removed => removed,
        }
    }
}

/// Removes a filter that a dead engine has left where nothing else of it can be found any more.
pub(super) fn remove_stray_filter(ifindex: Ifindex) -> Result<(), NetlinkError> {
    let mut clsact = Clsact::open(ifindex)?;
    match clsact.filter() {
        Ok(Some(Filter { made_qdisc, .. })) => {
            clsact.delete()?;
            if made_qdisc { clsact.delete_unused_qdisc() } else { Ok(()) }
        }
        Ok(None) => Ok(()),
        // Somebody else's.
        Err(e) if e.errno() == Some(Errno::EEXIST) => Ok(()),
        Err(e) => Err(e),
    }
}
