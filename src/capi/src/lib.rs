//! ctoffload from C. What each function does, on which threads, and who owns what is said in
//! `include/ctoffload.h`; here is how.
//!
//! | module | what it is |
//! |---|---|
//! | `edge` | errors, panics, and memory of the caller's |
//! | `values` | the structs of the header |
//! | `engine`, `worker`, `conn` | the functions of the header, by their first argument |
//! | `datapath`, `provider` | tables of callbacks, as the traits that they stand for |
//!
//! # Unsafe code
//! All of it that the library has is here: pointers of the caller's are followed, and its callbacks called. What
//! makes that sound is what the header demands of the caller; each block names what it relies on. A call of
//! this library never unwinds (`edge::guarded`).

mod conn;
mod datapath;
mod edge;
mod engine;
mod provider;
mod values;
mod worker;

#[cfg(test)]
mod tests;
