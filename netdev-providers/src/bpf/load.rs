//! How programs that are assembled here are loaded.

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use super::assembler::Insn;

// linux/bpf.h
const BPF_PROG_LOAD: c_int = 5;

/// The verifier gives up, with EAGAIN, when the thread is to look after a signal or other work of the kernel's
/// (`do_check` in `kernel/bpf/verifier.c`), and wants to be asked again. libbpf asks as often (its `PROG_LOAD_ATTEMPTS`).
const ATTEMPTS: usize = 5;

/// Loads a program, several times if `again` says of an error that it can be that one.
pub(crate) fn insist<T, E>(
    again: impl Fn(&E) -> bool,
    mut load: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    for _ in 1..ATTEMPTS {
        match load() {
            Err(e) if again(&e) => {}
            done => return done,
        }
    }
    load()
}

/// `union bpf_attr` of `BPF_PROG_LOAD`, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
}

/// Loads a program of this type.
///
/// # Errors
/// The bpf system call's, with the verifier's words if it has any.
pub(crate) fn load_program(prog_type: u32, name: &CStr, insns: &[Insn]) -> io::Result<OwnedFd> {
    let mut attr = ProgLoad {
        prog_type,
        insn_cnt: u32::try_from(insns.len()).unwrap_or(u32::MAX),
        insns: insns.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
        ..ProgLoad::default()
    };
    // At most 15 bytes and a NUL: the kernel refuses what is longer.
    for (to, from) in attr.prog_name.iter_mut().zip(name.to_bytes()) {
        *to = *from;
    }
    let is_eagain = |e: &io::Error| e.raw_os_error() == Some(libc::EAGAIN);
    let error = match insist(is_eagain, || bpf_prog_load(&attr)) {
        Ok(fd) => return Ok(fd),
        Err(e) => e,
    };
    // Once more for the verifier's words, of which the last line says it.
    let mut log = vec![0u8; 64 * 1024];
    attr.log_level = 1;
    attr.log_size = u32::try_from(log.len()).unwrap_or(0);
    attr.log_buf = log.as_mut_ptr().expose_provenance() as u64;
    let _ = bpf_prog_load(&attr);
    match last_words(&log) {
        Some(words) => Err(io::Error::new(error.kind(), format!("{error}: {words}"))),
        None => Err(error),
    }
}

/// What the verifier says at the end of its log, which ends with a NUL, before its statistics.
fn last_words(log: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(log.split(|&b| b == 0).next()?).into_owned();
    let line = text.lines().rev().find(|l| !l.is_empty() && !l.starts_with("processed"))?;
    Some(line.to_owned())
}

fn bpf_prog_load(attr: &ProgLoad) -> io::Result<OwnedFd> {
    // SAFETY: `attr` is the start of a `union bpf_attr`, of the size given, and what it points to
    // (instructions, licence, and the log buffer if there is one) outlives the call, which reads
    // `insn_cnt` instructions of 8 bytes and a NUL-terminated string, and writes at most `log_size`
    // bytes of log.
    let fd = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, std::ptr::from_ref(attr), size_of::<ProgLoad>())
    };
    let fd = RawFd::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system call has just made this descriptor (close-on-exec), and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bpf::assembler::{Reg, insn};

    #[test]
    fn of_the_verifiers_log_the_last_line_counts_before_its_statistics() {
        let log = b"0: (95) exit\nR0 !read_ok\nprocessed 1 insns (limit 1000000)\n\n\0\0junk\n";
        assert_eq!(last_words(log).as_deref(), Some("R0 !read_ok"));
        assert_eq!(last_words(b"processed 1 insns\n\0"), None);
        assert_eq!(last_words(&[0; 64]), None);
    }

    /// No privilege or no bpf(): the kernel tests of the lab decide then.
    pub(crate) fn is_not_for_us(e: &io::Error) -> bool {
        matches!(e.raw_os_error(), Some(libc::EPERM | libc::ENOSYS))
    }

    #[test]
    fn who_is_to_ask_again_does_so_five_times_in_all() {
        let ask = |succeeds_at: u32, again: bool| {
            let mut asked = 0;
            let done = insist(
                |_| again,
                || {
                    asked += 1;
                    if asked == succeeds_at { Ok(()) } else { Err(asked) }
                },
            );
            (done, asked)
        };
        assert_eq!(ask(1, true), (Ok(()), 1));
        assert_eq!(ask(5, true), (Ok(()), 5));
        assert_eq!(ask(6, true), (Err(5), 5));
        assert_eq!(ask(2, false), (Err(1), 1));
    }

    #[test]
    fn a_program_that_the_verifier_refuses_is_refused_in_its_words() {
        // It returns what nobody has set.
        let e = load_program(4, c"nothing", &[insn(0x95, Reg::R0, Reg::R0, 0, 0)]).unwrap_err();
        assert!(is_not_for_us(&e) || e.to_string().contains("R0 !read_ok"), "{e}");
    }
}
