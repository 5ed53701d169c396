use super::*;

#[test]
fn a_dependency_of_ours_must_be_allowed() {
    let manifest = "[package]\nname = \"culvert-x\"\n[dependencies]\nculvert-abi.workspace = true\n\
                    culvert-core = { path = \"..\" }\n[dev-dependencies]\nculvert-lab.workspace = true\n";
    let found = forbidden(manifest, &["culvert-abi"]);
    assert_eq!(found, [(5, "culvert-core".to_owned()), (7, "culvert-lab".to_owned())]);
}
