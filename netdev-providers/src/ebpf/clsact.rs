//! Where a kernel has no tcx (before 6.6), or others have filters that are to see the packets first: a filter of `cls_bpf`
//! in direct-action mode at the ingress hook of the netdev's qdisc, behind theirs.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use crate::contract::types::Ifindex;
use crate::netlink::error::{KernelError, NetlinkError};
use crate::netlink::modules::while_modules_come;
use crate::netlink::socket::{ACK, CREATE, DUMP, EXCL, Family, REQUEST, Socket};
use crate::netlink::wire::Message;

// linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TC_H_CLSACT: u32 = 0xffff_fff1;
const INGRESS_QDISC_HANDLE: u32 = 0xffff_0000;
const PARENT_INGRESS: u32 = 0xffff_fff2;
const PARENT_EGRESS: u32 = 0xffff_fff3;
const ETH_P_ALL: u16 = 0x0003;
const TCMSG_LEN: usize = 20;

/// Where the filter stands: behind all that the kernel gives to filters without a prio, and behind tc-flower's.
pub(super) const PRIO: u16 = 0xc110;
const HANDLE: u32 = 1;
/// What it is called: by this it is known to be ours.
const NAME: &str = "ctoffload_flows";
/// The same, at a qdisc that we made: whoever comes after us may remove it.
const NAME_AND_QDISC: &str = "ctoffload_flows_and_qdisc";

/// Our filter, as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// The id of its program.
    pub(super) program: u32,
    /// We made the qdisc.
    pub(super) made_qdisc: bool,
}

/// The ingress hook of a netdev.
#[derive(Debug)]
pub(super) struct Clsact {
    socket: Socket,
    ifindex: Ifindex,
}

impl Clsact {
    pub(super) fn open(ifindex: Ifindex) -> Result<Self, NetlinkError> {
        Ok(Self { socket: Socket::open(Family::Route)?, ifindex })
    }

    fn tcmsg(&self, handle: u32, parent: u32, info: u32) -> [u8; TCMSG_LEN] {
        let mut b = [0; TCMSG_LEN];
        b[4..8].copy_from_slice(&self.ifindex.get().to_ne_bytes());
        b[8..12].copy_from_slice(&handle.to_ne_bytes());
        b[12..16].copy_from_slice(&parent.to_ne_bytes());
        b[16..].copy_from_slice(&info.to_ne_bytes());
        b
    }

    fn request(
        &mut self,
        ty: u16,
        flags: u16,
        tcmsg: [u8; TCMSG_LEN],
        attributes: impl Fn(&mut Message<'_>),
    ) -> Result<(), NetlinkError> {
        let seq = self.socket.next_seq();
        let mut buf = Vec::with_capacity(128);
        let mut m = Message::new(&mut buf, ty, REQUEST | ACK | flags, seq);
        m.raw(&tcmsg);
        attributes(&mut m);
        m.finish();
        let lacks_a_module = |e: &NetlinkError| {
            const WORDS: [&str; 2] = ["Specified qdisc kind is unknown", "TC classifier not found"];
            let NetlinkError::Kernel(e) = e else { return false };
            e.errno == Errno::ENOENT
                && e.extack.as_deref().is_some_and(|said| WORDS.contains(&said))
        };
        while_modules_come(lacks_a_module, || self.socket.request(&buf, seq, |_| ()))
    }

    /// Makes a `clsact`, where there is no qdisc with an ingress hook; `false`: there is one already.
    pub(super) fn add_qdisc(&mut self) -> Result<bool, NetlinkError> {
        let tcmsg = self.tcmsg(INGRESS_QDISC_HANDLE, TC_H_CLSACT, 0);
        let kind = |m: &mut Message<'_>| _ = m.str(TCA_KIND, "clsact");
        match self.request(RTM_NEWQDISC, CREATE | EXCL, tcmsg, kind) {
            Ok(()) => Ok(true),
            Err(e) if e.errno() == Some(Errno::EEXIST) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Removes the `clsact` that we made, unless somebody has filters at it.
    pub(super) fn delete_unused_qdisc(&mut self) -> Result<(), NetlinkError> {
        let mut filters = 0;
        for parent in [PARENT_INGRESS, PARENT_EGRESS] {
            self.filters(parent, 0, |_, _| filters += 1)?;
        }
        if filters > 0 {
            return Ok(());
        }
        let tcmsg = self.tcmsg(INGRESS_QDISC_HANDLE, TC_H_CLSACT, 0);
        let kind = |m: &mut Message<'_>| _ = m.str(TCA_KIND, "clsact");
        match self.request(RTM_DELQDISC, 0, tcmsg, kind) {
            // Somebody has removed it, or made another kind in its place.
            Err(e) if matches!(e.errno(), Some(Errno::ENOENT | Errno::EINVAL)) => Ok(()),
            deleted => deleted,
        }
    }

    /// Puts the program there, in the place of the one that is there.
    pub(super) fn put(
        &mut self,
        program: BorrowedFd<'_>,
        made_qdisc: bool,
    ) -> Result<(), NetlinkError> {
        let name = if made_qdisc { NAME_AND_QDISC } else { NAME };
        let info = u32::from(PRIO) << 16 | u32::from(ETH_P_ALL.to_be());
        let tcmsg = self.tcmsg(HANDLE, PARENT_INGRESS, info);
        self.request(RTM_NEWTFILTER, CREATE, tcmsg, |m| {
            m.str(TCA_KIND, "bpf");
            m.nested_plain(TCA_OPTIONS, |m| {
                m.attr(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
                m.str(TCA_BPF_NAME, name);
                m.u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT);
            });
        })
    }

    /// Our filter there. `None`: there is none.
    ///
    /// # Errors
    /// Also EEXIST: a filter of somebody else is where it would be.
    pub(super) fn filter(&mut self) -> Result<Option<Filter>, NetlinkError> {
        let (mut ours, mut foreign) = (None, false);
        self.filters(PARENT_INGRESS, PRIO, |id, name| match (id, name) {
            (Some(program), Some(NAME | NAME_AND_QDISC)) => {
                ours = Some(Filter { program, made_qdisc: name == Some(NAME_AND_QDISC) });
            }
            _ => foreign = true,
        })?;
        if foreign {
            return Err(NetlinkError::Kernel(KernelError {
                errno: Errno::EEXIST,
                extack: Some(format!("somebody else has a filter at prio {PRIO}").into()),
            }));
        }
        Ok(ours)
    }

    /// Takes it away.
    pub(super) fn delete(&mut self) -> Result<(), NetlinkError> {
        let info = u32::from(PRIO) << 16 | u32::from(ETH_P_ALL.to_be());
        let tcmsg = self.tcmsg(HANDLE, PARENT_INGRESS, info);
        self.request(RTM_DELTFILTER, 0, tcmsg, |m| _ = m.str(TCA_KIND, "bpf"))
    }

    /// Filters of a prio, or (0) of all: their program's id and name, where they have one.
    fn filters(
        &mut self,
        parent: u32,
        prio: u16,
        mut each: impl FnMut(Option<u32>, Option<&str>),
    ) -> Result<(), NetlinkError> {
        let seq = self.socket.next_seq();
        let mut buf = Vec::with_capacity(64);
        let mut m = Message::new(&mut buf, RTM_GETTFILTER, REQUEST | DUMP, seq);
        m.raw(&self.tcmsg(0, parent, u32::from(prio) << 16));
        m.finish();
        let dumped = self.socket.dump(&buf, seq, |m| {
            let (RTM_NEWTFILTER, Some(b)) = (m.ty, m.fixed::<TCMSG_LEN>()) else { return };
            let word = |at: usize| u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
            let at = word(16) >> 16;
            let options = m.attrs(TCMSG_LEN).find_type(TCA_OPTIONS);
            if let (true, true, Some(options)) =
                (prio == 0 || at == prio.into(), word(8) != 0, options)
            {
                let option = |ty| options.nested().find_type(ty);
                let name = option(TCA_BPF_NAME).and_then(|a| a.str());
                each(option(TCA_BPF_ID).and_then(|a| a.u32()), name);
            }
        });
        match dumped {
            // What it has brought stands; or there is no qdisc.
            Ok(()) | Err(NetlinkError::Interrupted) => Ok(()),
            Err(e) if matches!(e.errno(), Some(Errno::EINVAL | Errno::ENOENT)) => Ok(()),
            Err(e) => Err(e),
        }
    }
}
