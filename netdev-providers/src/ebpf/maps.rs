//! The maps of a port: its table, the array that it stands in, and the netdevs that rules lead to.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use aya::maps::xdp::DevMapHash;
use aya::maps::{ArrayOfMaps, HashMap, Map, MapData, MapError};
use nix::errno::Errno;

use super::entry::{ENTRY, Entry, KEY, Key};
use crate::bpf::batch;
use crate::contract::types::Ifindex;

/// `BPF_F_NO_PREALLOC` (linux/bpf.h): memory comes with the entries.
const BPF_F_NO_PREALLOC: u32 = 1;
/// So many entries are read at a time.
const AT_A_TIME: usize = 4096;

/// The error number behind an error of the library, where there is one.
pub(super) fn errno_of(e: &(dyn std::error::Error + 'static)) -> Option<Errno> {
    let mut next = Some(e);
    while let Some(e) = next {
        if let Some(n) = e.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(Errno::from_raw(n));
        }
        next = e.source();
    }
    None
}

/// A table: what forwards is the one that stands in the array.
#[derive(Debug)]
pub(super) struct Flows(MapData);

impl Flows {
    /// An empty one is put in the place of the one that is there, and so is what is forwarded from now on: nothing.
    pub(super) fn replace(current: &mut Map, capacity: u32) -> Result<Arc<Self>, MapError> {
        let empty =
            HashMap::<MapData, [u8; KEY], [u8; ENTRY]>::create(capacity, BPF_F_NO_PREALLOC)?;
        ArrayOfMaps::<&mut MapData, HashMap<MapData, [u8; KEY], [u8; ENTRY]>>::try_from(
            &mut *current,
        )?
        .set(0, &empty, 0)?;
        Self::of(current)
    }

    /// The one that is there.
    pub(super) fn of(current: &Map) -> Result<Arc<Self>, MapError> {
        let data = ArrayOfMaps::<&MapData, MapData>::try_from(current)?.get(&0, 0)?;
        let info = data.info()?;
        let (size, expected) = (info.key_size() as usize, KEY);
        if size != expected {
            return Err(MapError::InvalidKeySize { size, expected });
        }
        let (size, expected) = (info.value_size() as usize, ENTRY);
        if size != expected {
            return Err(MapError::InvalidValueSize { size, expected });
        }
        Ok(Arc::new(Self(data)))
    }

    pub(super) fn capacity(&self) -> Result<u32, MapError> {
        Ok(self.0.info()?.max_entries())
    }

    #[expect(unsafe_code, reason = "the one place where lengths are promised: `of` has looked")]
    fn batches(&self) -> batch::Map<'_, KEY, ENTRY> {
        // SAFETY: it is the hash map that is an entry of `current_flows`, which takes no other kind, and `of` has
        // compared the lengths.
        unsafe { batch::Map::of(self.0.fd().as_fd()) }
    }

    /// Writes entries; of each that was refused, which it was and why.
    pub(super) fn write(&self, keys: &[[u8; KEY]], entries: &[[u8; ENTRY]]) -> Vec<(usize, Errno)> {
        each_refused(keys.len(), |from| self.batches().update(&keys[from..], &entries[from..]))
    }

    /// Removes entries; of each that was refused, which it was and why. One that is not there is none of them.
    pub(super) fn remove(&self, keys: &[[u8; KEY]]) -> Vec<(usize, Errno)> {
        let mut refused = each_refused(keys.len(), |from| self.batches().delete(&keys[from..]));
        refused.retain(|&(_, e)| e != Errno::ENOENT);
        refused
    }

    /// Hands all entries to `each`.
    pub(super) fn read(&self, mut each: impl FnMut(Key, Entry)) -> io::Result<()> {
        let mut room = AT_A_TIME;
        let (mut keys, mut entries) = (vec![[0; KEY]; room], vec![[0; ENTRY]; room]);
        let mut from = None;
        loop {
            match self.batches().read(from, &mut keys, &mut entries) {
                Ok((count, next)) => {
                    for (key, entry) in keys.iter().zip(&entries).take(count) {
                        each(Key(*key), Entry(*entry));
                    }
                    if next.is_none() {
                        return Ok(());
                    }
                    from = next;
                }
                // More have one hash than there is room for.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 20 => {
                    room *= 2;
                    (keys, entries) = (vec![[0; KEY]; room], vec![[0; ENTRY]; room]);
                }
                Err(e) => return Err(e),
            }
        }
    }
}

/// Goes on behind each that was refused.
fn each_refused(
    count: usize,
    mut carry_out: impl FnMut(usize) -> (usize, io::Result<()>),
) -> Vec<(usize, Errno)> {
    let (mut from, mut refused) = (0, Vec::new());
    while from < count {
        let (done, result) = carry_out(from);
        from += done;
        if let Err(e) = result {
            refused.push((from, Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))));
            from += 1;
        }
    }
    refused
}

/// The netdevs that rules lead to: a packet whose netdev is not among them goes up the stack. The kernel takes out
/// those that go.
#[derive(Debug)]
pub(super) struct Egress(Map);

impl Egress {
    pub(super) fn new(map: Map) -> Self {
        Self(map)
    }

    pub(super) fn has(&self, netdev: Ifindex) -> Result<bool, MapError> {
        match DevMapHash::try_from(&self.0)?.get(netdev.get(), 0) {
            Ok(_) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(e) => Err(e),
        }
    }

    pub(super) fn insert(&mut self, netdev: Ifindex) -> Result<(), aya::maps::xdp::XdpMapError> {
        DevMapHash::try_from(&mut self.0)?.insert(netdev.get(), netdev.get(), None, 0)
    }

    pub(super) fn remove(&mut self, netdev: Ifindex) -> Result<(), MapError> {
        DevMapHash::try_from(&mut self.0)?.remove(netdev.get())
    }

    /// All of them.
    pub(super) fn all(&self) -> Result<Vec<Ifindex>, MapError> {
        let map = DevMapHash::try_from(&self.0)?;
        let numbers: Vec<u32> = map.keys().collect::<Result<_, _>>()?;
        Ok(numbers.into_iter().filter_map(Ifindex::new).collect())
    }
}

/// The id of a map: what a program says which it uses.
pub(super) fn id_of(map: &Map) -> Option<u32> {
    let data = match map {
        Map::ArrayOfMaps(data) | Map::DevMapHash(data) => data,
        _ => return None,
    };
    data.info().ok().map(|info| info.id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_in_a_batch_is_told_one_by_one_and_the_rest_is_done() {
        let mut asked = Vec::new();
        let refused = each_refused(6, |from| {
            asked.push(from);
            let refuse = |n: usize, e: i32| (n - from, Err(io::Error::from_raw_os_error(e)));
            match from {
                0 => refuse(2, libc::E2BIG),
                3 => refuse(3, libc::ENOMEM),
                _ => (6 - from, Ok(())),
            }
        });
        assert_eq!(refused, [(2, Errno::E2BIG), (3, Errno::ENOMEM)]);
        assert_eq!(asked, [0, 3, 4]);
        assert_eq!(each_refused(0, |_| unreachable!("nothing is asked")), []);
        let last = each_refused(1, |_| (0, Err(io::Error::from_raw_os_error(libc::EPERM))));
        assert_eq!(last, [(0, Errno::EPERM)]);
    }
}
