//! Operations handed to a provider as the engine hands them over.

#![expect(clippy::unwrap_used, reason = "a helper of tests")]

use std::sync::mpsc;

use netdev_providers::{Operation, Outcome, Provider, Request, Ticket};

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
