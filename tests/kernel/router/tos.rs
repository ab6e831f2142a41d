//! Routes and rules that tell packets apart by their ToS.

use super::*;

#[test]
fn a_connection_that_has_other_routes_by_tos_stays_in_software_as_long_as_it_has() {
    let mut r = Router::new("tos");
    r.start(&PORTS);
    let mut c = r.connect();
    r.wait_installed(&BOTH, &mut c);
    // A gateway for one ToS, and for one direction.
    let route = "10.2.0.2 tos 0x10 via 10.2.0.77 dev wan";
    r.run(&format!("ip route add {route}"));
    let (out, back) = (("lan", "original"), ("wan", "reply"));
    r.wait_refused(out, "tos-routed", "ToS 0x10", &mut c);
    r.wait_installed(&["wan reply"], &mut c);
    r.run(&format!("ip route del {route}"));
    r.wait_installed(&BOTH, &mut c);
    // A rule for all that has it.
    r.run("ip rule add tos 0x08 prohibit");
    r.wait_refused(out, "tos-routed", "ToS 0x08", &mut c);
    r.wait_refused(back, "tos-routed", "ToS 0x08", &mut c);
    // One that is there when the daemon starts; and one that answers the same.
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
    r.run("ip rule add tos 0x04 table main");
    r.start(&PORTS);
    r.wait_refused(out, "tos-routed", "ToS 0x08", &mut c);
    r.run("ip rule del tos 0x08 prohibit");
    r.wait_installed(&BOTH, &mut c);
    // One that was known once is known.
    r.run(&format!("ip route add {route}"));
    r.wait_refused(out, "tos-routed", "ToS 0x10", &mut c);
    assert_eq!(r.signal(Signal::SIGTERM), Some(0));
}
