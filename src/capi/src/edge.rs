//! The edge between the two languages: errors, panics, and memory of the caller's.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use netdev_providers::{Fault, Permanence, Reason, Rejection};
use nix::errno::Errno;

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Error {
    errno: Errno,
    words: String,
}

pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(errno: Errno, words: impl Into<String>) -> Self {
        Self { errno, words: words.into() }
    }

    pub(crate) fn invalid(words: impl Into<String>) -> Self {
        Self::new(Errno::EINVAL, words)
    }

    pub(crate) fn words(self) -> String {
        self.words
    }
}

impl From<&Rejection> for Error {
    fn from(why: &Rejection) -> Self {
        let errno = match why.reason.permanence() {
            Permanence::Permanent => Errno::EOPNOTSUPP,
            Permanence::Transient => Errno::EAGAIN,
        };
        Self::new(errno, why.to_string())
    }
}

thread_local! {
    /// Words for the last error of this thread.
    static LAST: RefCell<CString> = RefCell::default();
    /// Words of a callback that is about to return.
    static SAID: RefCell<Option<Box<str>>> = const { RefCell::new(None) };
}

fn c_string(words: &str) -> CString {
    let words: Vec<u8> = words.bytes().filter(|b| *b != 0).collect();
    CString::new(words).unwrap_or_default()
}

/// Notes why a call fails; returns what it returns.
#[cold]
pub(crate) fn failed(error: &Error) -> c_int {
    // A thread that is ending has no words any more.
    let _ = LAST.try_with(|last| *last.borrow_mut() = c_string(&error.words));
    -(error.errno as c_int)
}

/// What a panic of the library's own is to the caller.
#[cold]
fn panicked() -> c_int {
    failed(&Error::new(Errno::EIO, "a bug of the library: it panicked"))
}

/// Runs what a function does. It never unwinds into the caller.
pub(crate) fn guarded(call: impl FnOnce() -> Result<()>) -> c_int {
    // What a panic leaves behind is behind locks of the engine, which go on.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => failed(&error),
        Err(_) => panicked(),
    }
}

/// The same for what is called for every batch of packets, and fails by returning what [`failed`] does.
#[inline]
pub(crate) fn guarded_lean(call: impl FnOnce() -> c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| panicked())
}

/// The same for what returns something else than an error.
#[inline]
pub(crate) fn guarded_or<T>(otherwise: T, call: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or(otherwise)
}

/// Words for the last error of this thread.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ctoffload_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Words for an errno.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ctoffload_strerror(error: c_int) -> *const c_char {
    guarded_or(c"".as_ptr(), || {
        if error == 0 {
            return c"no error".as_ptr();
        }
        // What is said of it is the same for ever: made once for each that is asked for.
        static WORDS: std::sync::Mutex<std::collections::BTreeMap<c_int, CString>> =
            std::sync::Mutex::new(std::collections::BTreeMap::new());
        let mut words = WORDS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let number = error.saturating_abs();
        // Entries are never changed or removed: the bytes stay where they are.
        words.entry(number).or_insert_with(|| c_string(Errno::from_raw(number).desc())).as_ptr()
    })
}

/// The name of a reason.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ctoffload_reason_name(reason: u32) -> *const c_char {
    guarded_or(c"unknown".as_ptr(), || {
        static NAMES: std::sync::OnceLock<Vec<(u32, CString)>> = std::sync::OnceLock::new();
        let names = NAMES
            .get_or_init(|| Reason::ALL.iter().map(|r| (*r as u32, c_string(r.name()))).collect());
        let found = names.iter().find(|(number, _)| *number == reason);
        found.map_or(c"unknown".as_ptr(), |(_, name)| name.as_ptr())
    })
}

/// Words for what this callback is about to return.
///
/// # Safety
/// `words` is NULL or a string.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ctoffload_say(words: *const c_char) {
    guarded_or((), || {
        // SAFETY: as the header demands.
        let said = unsafe { text(words) }.map(Into::into);
        let _ = SAID.try_with(|slot| *slot.borrow_mut() = said);
    });
}

/// Calls a callback; returns with what it said.
pub(crate) fn called<T>(callback: impl FnOnce() -> T) -> (T, Option<Box<str>>) {
    // What another has said in front of it is not about it.
    let _ = SAID.try_with(|slot| slot.borrow_mut().take());
    let result = callback();
    (result, SAID.try_with(|slot| slot.borrow_mut().take()).ok().flatten())
}

/// What a callback's answer stands for.
pub(crate) fn answered(
    answer: c_int,
    words: Option<Box<str>>,
) -> std::result::Result<(), Rejection> {
    if answer == 0 { Ok(()) } else { Err(rejection(answer, words)) }
}

/// A reason, or a negative errno.
pub(crate) fn rejection(why: c_int, words: Option<Box<str>>) -> Rejection {
    if let Some(reason) = u8::try_from(why).ok().and_then(Reason::from_number) {
        return Rejection { reason, errno: None, detail: words };
    }
    if why >= 0 {
        let words = words.unwrap_or_else(|| format!("{why} is no reason").into());
        return Rejection::with_detail(Reason::ProviderFault, words);
    }
    let errno = Errno::from_raw(why.saturating_neg());
    let reason = match errno {
        Errno::EOPNOTSUPP => Reason::Unsupported,
        Errno::ENOSPC => Reason::TableFull,
        Errno::EAGAIN | Errno::EBUSY | Errno::EINTR | Errno::ENOBUFS | Errno::ENOMEM => {
            Reason::Busy
        }
        Errno::EEXIST => Reason::Conflict,
        Errno::ENODEV => Reason::NetdevGone,
        _ => Reason::Refused,
    };
    Rejection { reason, errno: Some(errno), detail: words }
}

/// A callback's negative errno, as a failure of what was being done.
pub(crate) fn fault(what: &str, answer: c_int, words: Option<Box<str>>) -> Fault {
    let errno = (answer < 0).then(|| Errno::from_raw(answer.saturating_neg()));
    Fault { what: what.to_owned(), errno, detail: words.map(Into::into) }
}

/// Members that have no meaning yet, so that they can have one.
pub(crate) fn unused(what: &str, members: &[u32]) -> Result<()> {
    if members.iter().all(|member| *member == 0) {
        return Ok(());
    }
    Err(Error::new(Errno::E2BIG, format!("struct {what} says more than this library understands")))
}

/// A string of the caller's.
///
/// # Safety
/// It is NULL, or ends with a NUL and stays as it is for `'a`.
pub(crate) unsafe fn text<'a>(text: *const c_char) -> Option<std::borrow::Cow<'a, str>> {
    // SAFETY: as above, and it is not NULL.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy())
}

/// What a pointer of the caller's points to.
///
/// # Safety
/// It is NULL, or points to a `T` that lives, and is changed by nobody else, for `'a`.
pub(crate) unsafe fn reference<'a, T>(pointer: *const T, what: &str) -> Result<&'a T> {
    // SAFETY: as above; NULL is refused.
    unsafe { pointer.as_ref() }.ok_or_else(|| Error::invalid(format!("{what} is NULL")))
}

/// An array of the caller's.
///
/// # Safety
/// As of [`reference`], for `n` of them.
pub(crate) unsafe fn array<'a, T>(first: *const T, n: usize, what: &str) -> Result<&'a [T]> {
    if n == 0 {
        return Ok(&[]);
    }
    if first.is_null() {
        return Err(Error::invalid(format!("{what} is NULL")));
    }
    // SAFETY: as above, and it is not NULL.
    Ok(unsafe { std::slice::from_raw_parts(first, n) })
}

/// A struct of the header that begins with its size.
///
/// # Safety
/// It is `repr(C)`, its first member is that `u32`, every pattern of bits is a value of it (but for pointers that
/// the caller vouches for), and it has no padding.
pub(crate) unsafe trait Versioned: Copy {
    /// Its name in the header.
    const NAME: &'static str;
    /// The size that it had when it was new.
    const LEAST: usize;
}

/// The size that the caller gave a struct.
///
/// # Safety
/// `pointer` is NULL or points to a struct that begins with its size.
unsafe fn size_of_callers<T: Versioned>(pointer: *const T) -> Result<usize> {
    if pointer.is_null() {
        return Err(Error::invalid(format!("struct {} is NULL", T::NAME)));
    }
    // SAFETY: as above; nothing but the first member is read.
    let size = unsafe { pointer.cast::<u32>().read() } as usize;
    if size < T::LEAST {
        let why = format!("struct {}: its size is {size}, and {} at least", T::NAME, T::LEAST);
        return Err(Error::invalid(why));
    }
    Ok(size)
}

/// Reads a struct of the caller's: what it is too short for is zero, what it has more must be.
///
/// # Safety
/// `pointer` is NULL or points to as many bytes as its first member says, which nobody changes meanwhile.
pub(crate) unsafe fn read<T: Versioned>(pointer: *const T) -> Result<T> {
    // SAFETY: as above.
    let size = unsafe { size_of_callers(pointer) }?;
    let known = size.min(size_of::<T>());
    // SAFETY: `size` bytes can be read, as above.
    let bytes = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), size) };
    if bytes[known..].iter().any(|b| *b != 0) {
        let why = format!("struct {} says more than this library understands", T::NAME);
        return Err(Error::new(Errno::E2BIG, why));
    }
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: the first `known` bytes of both, which are different memory; then every byte of `value` is
    // set, and any bits are a `T` (`Versioned`).
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), value.as_mut_ptr().cast::<u8>(), known);
        Ok(value.assume_init())
    }
}

/// Writes a struct of the caller's, but for its size: as much as it has room for, and zeros behind that.
///
/// # Safety
/// `pointer` is NULL or points to as many bytes as its first member says, which are nobody else's meanwhile.
pub(crate) unsafe fn write<T: Versioned>(pointer: *mut T, value: &T) -> Result<()> {
    // SAFETY: as above.
    let size = unsafe { size_of_callers(pointer) }?;
    let known = size.min(size_of::<T>());
    let first = size_of::<u32>();
    // SAFETY: `size` bytes can be written, as above, of which `known` are also those of a `T`, which has
    // no padding.
    unsafe {
        let to = pointer.cast::<u8>();
        let from = std::ptr::from_ref(value).cast::<u8>();
        std::ptr::copy_nonoverlapping(from.add(first), to.add(first), known - first);
        std::ptr::write_bytes(to.add(known), 0, size - known);
    }
    Ok(())
}

/// An array of structs that begin with their size, which is the same for all.
pub(crate) struct Array<T> {
    first: *mut T,
    stride: usize,
    n: usize,
}

impl<T: Versioned> Array<T> {
    /// # Safety
    /// `first` is NULL or points to `n` structs, each as long as the first says, for as long as this is used.
    pub(crate) unsafe fn new(first: *mut T, n: usize) -> Result<Self> {
        if n == 0 {
            return Ok(Self { first, stride: 0, n });
        }
        // SAFETY: as above.
        let stride = unsafe { size_of_callers(first) }?;
        if !stride.is_multiple_of(align_of::<T>()) {
            return Err(Error::invalid(format!("struct {}: no struct is {stride} long", T::NAME)));
        }
        Ok(Self { first, stride, n })
    }

    pub(crate) fn len(&self) -> usize {
        self.n
    }

    /// The place of one. Within the array, as long as `at` is.
    pub(crate) fn at(&self, at: usize) -> *mut T {
        assert!(at < self.n);
        self.first.wrapping_byte_add(at * self.stride)
    }

    pub(crate) fn read(&self, at: usize) -> Result<T> {
        // SAFETY: it is one of the array, of which `new` was told that it is there.
        let size = unsafe { size_of_callers(self.at(at)) }?;
        if size != self.stride {
            let first = self.stride;
            let why = format!("struct {}: of an array one is {first} long, one {size}", T::NAME);
            return Err(Error::invalid(why));
        }
        // SAFETY: as above, and it is no longer than its place.
        unsafe { read(self.at(at)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Thing {
        size: u32,
        old: u32,
        new: u64,
    }

    // SAFETY: numbers without padding.
    unsafe impl Versioned for Thing {
        const NAME: &'static str = "thing";
        const LEAST: usize = 8;
    }

    #[test]
    fn what_a_shorter_struct_lacks_is_zero_and_what_a_longer_one_says_more_is_refused() {
        // SAFETY: of each array the size that it says.
        let read = |words: &[u64]| unsafe { read(words.as_ptr().cast::<Thing>()) };
        let thing = |size: u64| size | 7 << 32;
        assert_eq!(read(&[thing(8)]).unwrap(), Thing { size: 8, old: 7, new: 0 });
        assert_eq!(read(&[thing(16), 9]).unwrap(), Thing { size: 16, old: 7, new: 9 });
        assert_eq!(read(&[thing(24), 9, 0]).unwrap().new, 9);
        assert_eq!(read(&[thing(24), 9, 1]).unwrap_err().errno, Errno::E2BIG);
        assert_eq!(read(&[thing(7), 0]).unwrap_err().errno, Errno::EINVAL);
        // SAFETY: NULL is refused.
        let null = unsafe { super::read(std::ptr::null::<Thing>()) };
        assert_eq!(null.unwrap_err().errno, Errno::EINVAL);
    }

    #[test]
    fn what_is_written_goes_as_far_as_there_is_room_and_leaves_the_size() {
        let value = Thing { size: 16, old: 1, new: 2 };
        let written = |mut words: Vec<u64>| {
            // SAFETY: of each array the size that it says.
            unsafe { write(words.as_mut_ptr().cast::<Thing>(), &value) }.unwrap();
            words
        };
        assert_eq!(written(vec![8, 5]), [8 | 1 << 32, 5]);
        assert_eq!(written(vec![16, 5, 5]), [16 | 1 << 32, 2, 5]);
        assert_eq!(written(vec![24, 5, 5]), [24 | 1 << 32, 2, 0]);
    }

    #[test]
    fn a_panic_is_an_error_with_words_and_a_callbacks_words_are_its_own() {
        assert_eq!(guarded(|| panic!("on purpose")), -(Errno::EIO as c_int));
        assert_eq!(guarded(|| Err(Error::invalid("nothing at all"))), -(Errno::EINVAL as c_int));
        // SAFETY: static, or until the next error of this thread.
        let shown = |words| unsafe { text(words) }.unwrap();
        assert_eq!(shown(ctoffload_last_error()), "nothing at all");
        assert_eq!(shown(ctoffload_strerror(-2)), "No such file or directory");
        assert_eq!(ctoffload_strerror(2), ctoffload_strerror(-2));
        assert_eq!(shown(ctoffload_reason_name(3)), "table-full");
        assert_eq!(shown(ctoffload_reason_name(255)), "unknown");
        // SAFETY: strings.
        unsafe { ctoffload_say(c"of somebody else".as_ptr()) };
        assert_eq!(called(|| 1), (1, None));
        // SAFETY: as above.
        let say = || unsafe { ctoffload_say(c"no more room".as_ptr()) };
        assert_eq!(called(say).1.as_deref(), Some("no more room"));
    }

    #[test]
    fn a_callback_refuses_by_reason_or_by_errno() {
        assert_eq!(answered(0, None), Ok(()));
        assert_eq!(rejection(3, None), Reason::TableFull.into());
        for (errno, reason) in [
            (Errno::EOPNOTSUPP, Reason::Unsupported),
            (Errno::ENOSPC, Reason::TableFull),
            (Errno::ENOMEM, Reason::Busy),
            (Errno::EEXIST, Reason::Conflict),
            (Errno::ENODEV, Reason::NetdevGone),
            (Errno::EINVAL, Reason::Refused),
        ] {
            let why = rejection(-(errno as c_int), None);
            assert_eq!((why.reason, why.errno), (reason, Some(errno)));
        }
        assert_eq!(rejection(999, None).reason, Reason::ProviderFault);
        assert_eq!(rejection(c_int::MIN, None).reason, Reason::Refused);
    }
}
