//! Where maps and links of a port outlive their daemon: a directory of its own in bpffs.
//!
//! ```text
//! /sys/fs/bpf/ctoffload/<inode of the network namespace>/<ifindex>-<layout>/
//!   current_flows      the array with the port's table in it
//!   egress_netdevs     netdevs that rules lead to
//!   link               XDP or tcx (a filter of cls_bpf stands by itself)
//! ```
//! An ifindex is reused, and so is the inode of a network namespace: what is found there is the port's if the program
//! that its netdev has is one that uses these maps.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};

use tracing::debug;

use super::entry::LAYOUT;
use crate::bpf::detach_pinned;
use crate::contract::types::Ifindex;

/// `BPF_FS_MAGIC` (linux/magic.h).
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

const LINK: &str = "link";

/// The directory of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pins {
    dir: PathBuf,
}

impl Pins {
    /// Those of a netdev of the network namespace that the calling thread is in.
    ///
    /// # Errors
    /// Why nothing can outlive the daemon.
    pub(super) fn of(root: &Path, ifindex: Ifindex) -> io::Result<Self> {
        // The nearest that is there.
        let there = root.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
        if statfs(there)?.filesystem_type() != BPF_FS_MAGIC {
            let what = format!("{} is in no bpffs", root.display());
            return Err(io::Error::new(io::ErrorKind::Unsupported, what));
        }
        let namespace = fs::metadata("/proc/thread-self/ns/net")?.ino();
        Ok(Self { dir: root.join(namespace.to_string()).join(format!("{ifindex}-{LAYOUT}")) })
    }

    pub(super) fn make(&self) -> io::Result<()> {
        fs::create_dir_all(&self.dir)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// Where the link is pinned.
    pub(super) fn link(&self) -> PathBuf {
        self.path(LINK)
    }

    /// Removes the pin of a link that does nothing any more.
    pub(super) fn remove_link(&self) -> io::Result<()> {
        fs::remove_file(self.link())
    }

    /// Removes all that is in it, and itself; what lives by nothing else ends with that.
    pub(super) fn remove(&self) -> io::Result<()> {
        remove(&self.dir)?;
        // Of the last port the directory of the namespace too; another port's is not empty.
        if let Some(namespace) = self.dir.parent() {
            let _ = fs::remove_dir(namespace);
        }
        Ok(())
    }

    /// Removes what daemons with other layouts have left of this netdev.
    pub(super) fn remove_others(&self, ifindex: Ifindex) -> io::Result<u64> {
        let Some(namespace) = self.dir.parent() else { return Ok(0) };
        let mut removed = 0;
        let entries = match fs::read_dir(namespace) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let name =
                path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            if path != self.dir
                && name.split_once('-').is_some_and(|(i, _)| i == ifindex.to_string())
            {
                remove(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// (`remove_dir_all` opens what it removes; things in bpffs cannot be opened.)
fn remove(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name == LINK)
            && let Ok(link) = CString::new(path.as_os_str().as_bytes())
            && let Err(e) = detach_pinned(&link)
        {
            debug!(path = %path.display(), "a link is not detached, and ends with its pin: {e}");
        }
        fs::remove_file(path)?;
    }
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_in_no_bpffs_is_told() {
        let root = std::env::temp_dir().join("no").join("such");
        let why = Pins::of(&root, Ifindex::new(7).unwrap()).unwrap_err();
        assert!(why.to_string().contains("bpffs"), "{why}");
    }
}
