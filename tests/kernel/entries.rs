//! The tables of ebpf's ports, read past the provider: from the program that stands on a netdev to the maps that it
//! uses.

use aya::maps::{ArrayOfMaps, HashMap, Map, MapData, MapInfo};
use aya::programs::tc::SchedClassifier;
use aya::programs::{TcAttachType, loaded_programs};

use crate::script;

/// Rules on a netdev of the calling thread's network namespace.
pub(crate) fn entries(dev: &str) -> usize {
    programs(dev).into_iter().filter_map(entries_of).sum()
}

/// The ids of the programs that stand there: by tcx, by a filter, by XDP.
fn programs(dev: &str) -> Vec<u32> {
    let mut ids: Vec<u32> = SchedClassifier::query_tcx(dev, TcAttachType::Ingress)
        .map(|(_, programs)| programs.iter().map(|p| p.id()).collect())
        .unwrap_or_default();
    for shown in [format!("tc filter show dev {dev} ingress"), format!("ip -d link show {dev}")] {
        let text = String::from_utf8_lossy(&script::run(&shown).stdout).into_owned();
        let words: Vec<_> = text.split_whitespace().collect();
        // `... direct-action not_in_hw id 23 ...`, `prog/xdp id 23 ...`.
        ids.extend(
            words.windows(2).filter(|w| w[0] == "id").filter_map(|w| w[1].parse::<u32>().ok()),
        );
    }
    ids
}

/// `None`: it is no program of ours.
fn entries_of(program: u32) -> Option<usize> {
    let programs = loaded_programs().filter_map(Result::ok);
    let program = programs.into_iter().find(|p| p.id() == program)?;
    let maps = program.map_ids().ok()??;
    let current = maps.into_iter().find(|&id| {
        MapInfo::from_id(id).is_ok_and(|info| info.name_as_str() == Some("current_flows"))
    })?;
    let current = Map::from_map_data(MapData::from_id(current).ok()?).ok()?;
    let current =
        ArrayOfMaps::<MapData, HashMap<MapData, [u8; 40], [u8; 112]>>::try_from(current).ok()?;
    let table = current.get(&0, 0).expect("a table");
    Some(table.keys().filter_map(Result::ok).count())
}
