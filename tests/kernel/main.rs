//! Tests against a real kernel: root, and a kernel with the TC and nf_tables modules. They run in
//! `scripts/lab --nic` on Debian 6.1 and 6.12 (`scripts/test` does it; `--all-kernels`: up to 7.3); each test
//! has a network namespace of its own. They run one at a time, or with `--threads` several: those whose names
//! begin with `alone_` change what all namespaces have in common, or want the machine's whole time, and run when
//! nothing else does.

mod ebpf;
mod entries;
mod flower;
mod flowtable;
mod hardware;
mod host;
mod mixed;
mod modules;
mod netfilter;
mod netlink;
mod netns;
mod nic;
mod nic_faults;
mod oracle;
mod release;
mod router;
mod script;
mod shown;
mod submit;
mod wait;
