//! The table of a port of ebpf, read past the daemon: a rule is in place when its entry stands here.

use std::net::IpAddr;

use aya::maps::{ArrayOfMaps, HashMap, Map, MapData, MapInfo};
use aya::programs::tc::SchedClassifier;
use aya::programs::{TcAttachType, loaded_programs};
use netdev_providers::Tuple;

/// A map that a flush has not replaced.
pub(crate) struct Table(HashMap<MapData, [u8; 40], [u8; 112]>);

impl Table {
    /// That of a netdev.
    ///
    /// # Panics
    /// When no program of ebpf stands there.
    pub(crate) fn of(netdev: &str) -> Self {
        let (_, there) =
            SchedClassifier::query_tcx(netdev, TcAttachType::Ingress).expect("tcx programs");
        let there: Vec<u32> = there.iter().map(|p| p.id()).collect();
        let ours = loaded_programs().filter_map(Result::ok).filter(|p| there.contains(&p.id()));
        let maps = ours.filter_map(|p| p.map_ids().ok()?).flatten();
        let current = maps
            .into_iter()
            .find(|&id| {
                MapInfo::from_id(id).is_ok_and(|i| i.name_as_str() == Some("current_flows"))
            })
            .expect("a table");
        let current = Map::from_map_data(MapData::from_id(current).expect("a map")).expect("a map");
        let current =
            ArrayOfMaps::<MapData, HashMap<MapData, [u8; 40], [u8; 112]>>::try_from(current)
                .expect("an array of tables");
        Self(current.get(&0, 0).expect("a table"))
    }

    /// Whether packets that arrive with this tuple have a rule.
    pub(crate) fn has(&self, arriving: &Tuple) -> bool {
        self.0.get(&key(arriving), 0).is_ok()
    }
}

/// `struct key` of `flows.bpf.c`.
fn key(tuple: &Tuple) -> [u8; 40] {
    let mut key = [0; 40];
    for (at, address) in [(0, tuple.src()), (16, tuple.dst())] {
        match address {
            IpAddr::V4(a) => key[at..at + 4].copy_from_slice(&a.octets()),
            IpAddr::V6(a) => key[at..at + 16].copy_from_slice(&a.octets()),
        }
    }
    key[32..34].copy_from_slice(&tuple.sport().to_be_bytes());
    key[34..36].copy_from_slice(&tuple.dport().to_be_bytes());
    key[38] = if tuple.is_ipv6() { 6 } else { 4 };
    key[39] = tuple.proto().number();
    key
}
