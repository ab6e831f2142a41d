//! Netdevs and operations, handed to a provider as the engine hands them over.

#![expect(clippy::unwrap_used, reason = "a helper of tests")]

use std::sync::mpsc;

use netdev_providers::{
    Generation, HwFlags, Ifindex, Netdev, Operation, Outcome, Provider, Request, Ticket,
};
use nix::net::if_::if_nametoindex;

/// In the network namespace of the calling thread.
pub(crate) fn ifindex(name: &str) -> Ifindex {
    Ifindex::new(if_nametoindex(name).unwrap()).unwrap()
}

/// The same.
pub(crate) fn netdev(name: &str, hw_flags: HwFlags) -> Netdev {
    Netdev {
        ifindex: ifindex(name),
        generation: Generation::new(1).unwrap(),
        name: name.into(),
        hw_flags,
    }
}

/// In one batch; the outcomes in order. All must be there when the provider comes back.
pub(crate) fn submit(provider: &dyn Provider, requests: Vec<Request>) -> Vec<Outcome> {
    let (tx, rx) = mpsc::channel();
    let n = requests.len();
    let batch = requests.into_iter().enumerate().map(|(i, request)| {
        let tx = tx.clone();
        let ticket = Ticket::new(Box::new(move |o: Outcome| tx.send((i, o)).unwrap()));
        Operation { request, ticket }
    });
    provider.submit(batch.collect());
    let mut got: Vec<(usize, Outcome)> = rx.try_iter().collect();
    got.sort_by_key(|(i, _)| *i);
    assert_eq!(got.len(), n, "every operation has one result when submit returns");
    got.into_iter().map(|(_, o)| o).collect()
}
