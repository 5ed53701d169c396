//! The rules of istio-cni: within a pod, and on its node for what the node's own processes send.

use anyhow::Result;
use culvert_lab::lab::Pod;
use culvert_lab::place::Place;

/// What istio-cni leads to the agent in one pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodRules {
    /// Questions for names (annotation `ambient.istio.io/dns-capture`).
    pub names: bool,
    /// Connections from elsewhere; otherwise the agent gets tunnels only (annotation
    /// `ambient.istio.io/bypass-inbound-capture`).
    pub inbound: bool,
}

impl Default for PodRules {
    fn default() -> Self {
        Self { names: false, inbound: true }
    }
}

/// Redirection within the pod, both families. Rules stand in the order in which they are met.
const POD: &str = r#"
table inet istio-ambient-mangle {
  chain prerouting { type filter hook prerouting priority mangle; policy accept; jump istio-prerouting; }
  chain output { type route hook output priority mangle; policy accept; jump istio-output; }
  chain istio-prerouting {
    meta mark & 0xfff == 0x539 counter ct mark set ct mark & 0xfffff000 | 0x111
  }
  chain istio-output {
    ct mark & 0xfff == 0x111 counter meta mark set ct mark
  }
}
table inet istio-ambient-nat {
  chain prerouting { type nat hook prerouting priority dstnat; policy accept; jump istio-prerouting; }
  chain output { type nat hook output priority -100; policy accept; jump istio-output; }
  chain istio-prerouting {
  }
  chain istio-output {
    meta l4proto tcp ip daddr 169.254.7.127 counter accept
    meta l4proto tcp ip6 daddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff counter accept
    @names@
    meta l4proto tcp meta mark & 0xfff == 0x111 counter accept
    oifname "lo" ip daddr != 127.0.0.1/32 counter accept
    oifname "lo" ip6 daddr != ::1/128 counter accept
    meta l4proto tcp ip daddr != 127.0.0.1/32 meta mark & 0xfff != 0x539 counter redirect to :15001
    meta l4proto tcp ip6 daddr != ::1/128 meta mark & 0xfff != 0x539 counter redirect to :15001
  }
}
"#;

/// What takes connections from elsewhere.
const INBOUND: &str = r#"
add rule inet istio-ambient-nat istio-prerouting meta l4proto tcp ip saddr 169.254.7.127 counter accept
add rule inet istio-ambient-nat istio-prerouting meta l4proto tcp ip6 saddr fd16:9254:7127:1337:ffff:ffff:ffff:ffff counter accept
add rule inet istio-ambient-nat istio-prerouting ip daddr != 127.0.0.1/32 tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006
add rule inet istio-ambient-nat istio-prerouting ip6 daddr != ::1/128 tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006
"#;

/// What takes questions for names, in the place of `@names@`.
const NAMES: &str = r#"
    oifname != "lo" udp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053
    ip daddr != 127.0.0.1/32 tcp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053
    ip6 daddr != ::1/128 tcp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053
"#;

/// What keeps the agent's own questions apart from those of the pod that it answers.
const OWN_NAMES: &str = r#"
table inet istio-ambient-raw {
  chain prerouting { type filter hook prerouting priority raw; policy accept; jump istio-prerouting; }
  chain output { type filter hook output priority raw; policy accept; jump istio-output; }
  chain istio-prerouting { udp sport 53 meta mark & 0xfff != 0x539 counter ct zone set 1; }
  chain istio-output { udp dport 53 meta mark & 0xfff == 0x539 counter ct zone set 1; }
}
"#;

/// What the node's own processes send to enrolled pods comes from one address.
const NODE: &str = r#"
table inet istio-ambient-host {
  set probes-v4 { type ipv4_addr; }
  set probes-v6 { type ipv6_addr; }
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    meta skuid 0 meta l4proto tcp ip daddr @probes-v4 counter snat ip to 169.254.7.127
    meta skuid 0 meta l4proto tcp ip6 daddr @probes-v6 counter snat ip6 to fd16:9254:7127:1337:ffff:ffff:ffff:ffff
  }
}
"#;

/// Puts the rules into a pod.
pub fn add_rules(pod: &Place, rules: PodRules) -> Result<()> {
    let mut script = POD.replace("@names@", if rules.names { NAMES } else { "" });
    for (wanted, more) in [(rules.inbound, INBOUND), (rules.names, OWN_NAMES)] {
        script.push_str(if wanted { more } else { "" });
    }
    nft(pod, &script)?;
    for (family, all) in FAMILIES {
        let route = ["route", "add", "local", all, "dev", "lo", "table", "100"];
        pod.output("ip", &[&[family][..], &route].concat())?;
        pod.output("ip", &[&[family, "rule", "add"][..], &RULE].concat())?;
    }
    Ok(())
}

/// What enters a pod by this interface counts as what the pod sends (annotation
/// `istio.io/reroute-virtual-interfaces`).
pub fn reroute(pod: &Place, interface: &str) -> Result<()> {
    let chain = "rule inet istio-ambient-nat istio-prerouting";
    nft(
        pod,
        &format!(
            "insert {chain} iifname {interface} meta l4proto tcp counter return\n\
             insert {chain} iifname {interface} meta l4proto tcp counter redirect to :15001\n"
        ),
    )
}

/// Takes them away again, all of them.
pub fn remove_rules(pod: &Place) -> Result<()> {
    // One that is not there can be made, but not removed; all go in one step.
    let gone = ["nat", "mangle", "raw"].map(|table| {
        format!("table inet istio-ambient-{table}\ndelete table inet istio-ambient-{table}\n")
    });
    nft(pod, &gone.concat())?;
    for (family, all) in FAMILIES {
        let route = ["route", "del", "local", all, "dev", "lo", "table", "100"];
        pod.output("ip", &[&[family][..], &route].concat())?;
        pod.output("ip", &[&[family, "rule", "del"][..], &RULE].concat())?;
    }
    Ok(())
}

const FAMILIES: [(&str, &str); 2] = [("-4", "0.0.0.0/0"), ("-6", "::/0")];
const RULE: [&str; 6] = ["fwmark", "0x111/0xfff", "pref", "32764", "lookup", "100"];

/// Makes a node ready for [`add_probe`].
pub fn guard_probes(node: &Place) -> Result<()> {
    nft(node, NODE)
}

/// From now on the node's own processes reach this pod from istio-cni's address.
pub fn add_probe(node: &Place, pod: &Pod) -> Result<()> {
    change_probe("add", node, pod)
}

/// They do so no longer.
pub fn remove_probe(node: &Place, pod: &Pod) -> Result<()> {
    change_probe("delete", node, pod)
}

fn change_probe(verb: &str, node: &Place, pod: &Pod) -> Result<()> {
    let (v4, v6) = (pod.v4(), pod.v6());
    nft(
        node,
        &format!(
            "{verb} element inet istio-ambient-host probes-v4 {{ {v4} }}\n\
             {verb} element inet istio-ambient-host probes-v6 {{ {v6} }}\n"
        ),
    )
}

fn nft(place: &Place, script: &str) -> Result<()> {
    place.output("nft", &[script]).map(drop)
}
