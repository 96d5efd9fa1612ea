//! Packet sizes: ICMP echo through the tunnel, and the errors for what does not fit.

use anyhow::{Result, ensure};
use coil_lab::drive::{Addresses, exec, kubectl, pod, until};
use coil_lab::{ExecOptions, Lab};

use crate::support::{INTERNET, client, egress, ip, ready, remove, scenarios};

scenarios! { large_packets_are_told_the_tunnel_mtu }

/// `ping` without fragmentation: what fits the tunnel passes, what does not gets an ICMP error with
/// the tunnel's MTU, which the pod's kernel then knows.
async fn large_packets_are_told_the_tunnel_mtu(lab: &Lab) -> Result<()> {
    let name = ("mtu-client", "client");
    let manifest = egress("mtu", "e", &["203.0.113.0/24", "2001:db8:ffff::/48"], "")
        + &client(name.0, name.1, "worker1", &[("egress.coil.cybozu.com/mtu", "e")]);
    ready(lab, &manifest, ("mtu", "e"), name).await?;
    let place = pod(name.0, name.1);
    // Headers of outer IP and UDP, of inner IP and ICMP.
    for (server, outer, inner) in [(INTERNET[0], 28, 28), (INTERNET[1], 48, 48)] {
        let tunnel = 1500 - outer;
        let fits = (tunnel - inner).to_string();
        let argv = ["ping", "-c", "2", "-i", "0.2", "-W", "2", "-M", "do", "-s", &fits, server];
        until("the largest packet that fits passes", || exec(lab, &place, &argv)).await?;
        let large = (1500 - inner).to_string();
        let argv = ["ping", "-c", "3", "-i", "0.2", "-W", "2", "-M", "do", "-s", &large, server];
        let output = lab.exec(&place, &argv, ExecOptions::default()).await?;
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success(), "a packet of 1500 bytes passed: {text}");
        ensure!(
            text.contains(&format!("mtu={tunnel}")) || text.contains(&format!("mtu: {tunnel}")),
            "no MTU {tunnel} in: {text}"
        );
        let route = exec(lab, &place, &["ip", "route", "get", server]).await?;
        ensure!(route.contains(&format!("mtu {tunnel}")), "the pod has not learned the MTU: {route}");
    }
    let gateways = Addresses::of_egress(lab, "mtu", "e").await?;
    ensure!(gateways.like(ip(INTERNET[0])).is_ok(), "the egress pods are gone");
    kubectl(lab, &["delete", "--namespace", name.0, "pod", name.1], "").await?;
    remove(lab, &["mtu-client", "mtu"]).await
}
