from qstar.commands.main import main

raise SystemExit(main())
